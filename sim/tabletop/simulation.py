"""The tabletop as a simulation of episodes: what `LiberoSimulation` is for LIBERO.

Nothing between an action and an observation is simplified. An action is a setpoint for the supervisor, whose
safety filter and driver run at the arm's own 100 Hz; the driver's packets reach the same emulated servos that
stand behind the emulated serial port; and the state is what those servos report, in whole steps. A policy
that is trained here therefore sees on the emulated port what it was trained on.

An observation is taken at the end of a control step: one more sample of the servos, and the frames of that
same instant.
"""

from __future__ import annotations

import numpy as np

from vla.contract import Interface
from vla.errors import UserError
from vla.robot_drivers.emulation.direct import direct_driver
from vla.robot_drivers.emulation.line import EmulatedLine
from vla.robot_drivers.emulation.renderer import SceneRenderer
from vla.robot_drivers.emulation.tabletop import CAMERAS, INSTRUCTION, Tabletop
from vla.robot_drivers.so101.driver import so101_info
from vla.robot_drivers.so101.interface import from_policy, so101_interface, to_policy
from vla.robot_drivers.supervisor import Mode, Supervisor
from vla.sim.episode import Episode
from vla.sim.tabletop.suite import SUITE, tabletop_suite

CONTROL_RATE = 25
"""Hz; four cycles of the arm's loop per action."""
CYCLES = 4
IMAGE_SIZE = 128


def tabletop_interface(image_size: int = IMAGE_SIZE) -> Interface:
    """What the tabletop offers a policy: cameras top and wrist, joint positions (6), 25 Hz."""
    return so101_interface(dict.fromkeys(CAMERAS, (image_size, image_size)), float(CONTROL_RATE))


class TabletopSimulation:
    """The one task of the suite. `image_size` is in pixels; OpenGL starts at the first frame.

    Raises `UserError` for another suite or task.
    """

    def __init__(
        self, suite: str = SUITE, task: int = 0, *, image_size: int = IMAGE_SIZE, multisample: int = 4
    ):
        if suite != SUITE:
            raise UserError(f"The tabletop is the suite '{SUITE}', not '{suite}'.")
        self.suite = tabletop_suite()
        self.task = self.suite.task(task)
        self.language = INSTRUCTION
        self.image_size, self.multisample = image_size, multisample
        self.table = Tabletop()
        self.period = 1 / (CONTROL_RATE * CYCLES)  # s, one cycle of the arm's loop
        self.driver_info = so101_info(self.table.calibration)
        self.success = False
        self._now = 0.0
        self._renderer: SceneRenderer | None = None
        self._drawn: np.ndarray | None = None  # positions to draw, if not the present ones

    @property
    def step_limit(self) -> int:
        """Control steps of an episode."""
        return self.suite.step_limit()

    def reset(self, episode: Episode, settle_steps: int = 10) -> None:
        """Start `episode`: everything is drawn from its seed. The arm takes hold and waits `settle_steps`.

        Raises `UserError` if the episode belongs elsewhere.
        """
        if (episode.suite, episode.task) != (SUITE, self.task.index):
            raise UserError(
                f"The episode is for {episode.suite} task {episode.task}, this simulation is {SUITE} task"
                f" {self.task.index}."
            )
        self.table.reset(episode.seed)
        self._now, self._drawn = 0.0, None
        line = EmulatedLine(world=self.table)
        driver = direct_driver(line, self.table.calibration, self.period, lambda: self._now)
        self.supervisor = Supervisor(driver, np.array(driver.info.rest))
        self.supervisor.open()
        self.supervisor.enable(self._now)
        for _ in range(settle_steps):
            self._cycle()
        self.success = self.table.success

    def step(self, action: np.ndarray) -> bool:
        """Command joint positions (6,) for 1/25 s, degrees and percent, and return `success`.

        Raises `ValueError` for a wrong shape. What is not finite or not allowed the safety filter refuses.
        """
        self._drawn = None
        self.supervisor.setpoint(from_policy(action), self._now, within=CYCLES * self.period)
        self._cycle()
        self.success = self.table.success
        return self.success

    def _cycle(self) -> None:
        """One control step of the arm's loop."""
        for _ in range(CYCLES):
            self._now += self.period
            self.supervisor.cycle(self._now)

    @property
    def faulty(self) -> bool:
        """Whether the arm has latched a fault, after which it does not move any more."""
        return self.supervisor.mode in (Mode.FAULT, Mode.LOST)

    def state(self) -> np.ndarray:
        """Return the joint positions that the servos report, (6,) float32, degrees and percent."""
        return to_policy(self.supervisor.driver.read().q)

    def images(self) -> dict[str, np.ndarray]:
        """Draw the present: camera name to (H, W, 3) uint8."""
        if self._renderer is None:
            size = self.image_size
            self._renderer = SceneRenderer(self.table.model, size, size, self.multisample)
        qpos = self.table.data.qpos if self._drawn is None else self._drawn
        return {name: self._renderer.render(qpos, name) for name in CAMERAS}

    def sim_state(self) -> np.ndarray:
        """Return the positions of everything, float64 (20,): enough to draw this instant again."""
        return self.table.data.qpos.copy()

    def set_sim_state(self, x: np.ndarray) -> None:
        """Make `images` draw the positions `x` (20,) until the next step; the world stays as it is."""
        x = np.asarray(x, float)
        if x.shape != self.table.data.qpos.shape:
            raise ValueError(f"the tabletop has {self.table.data.qpos.size} positions, got {x.shape}")
        self._drawn = x.copy()

    def close(self) -> None:
        """Free the renderer."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def __enter__(self) -> TabletopSimulation:
        return self

    def __exit__(self, *_) -> None:
        self.close()

"""A scripted demonstrator for the tabletop: joint setpoints only, from privileged poses of cube and bowl.

Every action is a function of where the arm and the things are now, within the phase of the task: a wanted
joint vector q* from inverse kinematics, and the setpoint

    a = q + min(1, L / max|q* - q|) (q* - q)

which is at most L ahead of the measured position, so that the arm moves at an even pace and stops at q*.
There is no trajectory clock: an arm that was pushed off its way (`JointNoise`) is simply on another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from vla.robot_drivers.emulation.plant import to_steps
from vla.robot_drivers.emulation.tabletop import BOWL_HEIGHT, CUBE_HALF, SHOULDER
from vla.robot_drivers.so101.calibration import GRIPPER, JOINTS
from vla.robot_drivers.so101.interface import to_policy
from vla.sim.demonstrators.demonstrator import Demonstration, Record, carry_out
from vla.sim.demonstrators.style import DEFAULT, BurstNoise, Style
from vla.sim.tabletop.kinematics import Kinematics, pointing_down
from vla.sim.tabletop.simulation import TabletopSimulation

LEAD = 0.13
"""Radians that a setpoint is ahead of the arm at full speed."""
OPEN, CLOSED = 0.80, -0.17
"""Gripper angles, rad: wide enough for the cube's diagonal, and as far as it goes."""
READY_HEIGHT = 0.11
"""Metres above the table at which the hand turns from one thing to the next."""
GRASP_HEIGHT = CUBE_HALF + 0.002
RELEASE_HEIGHT = BOWL_HEIGHT + 0.018
CLOSING_STEPS, OPENING_STEPS = 12, 8
ATTEMPTS = 4

Actions = Iterator[np.ndarray]


class TabletopDemonstrator:
    """Solves the task of a simulation that has just been reset, one action at a time.

    `seed` fixes every random choice. Of `style` the speed, the approach height, the clearance and the
    waypoint noise are drawn; `grasp_spread` has no meaning for a cube.
    """

    def __init__(self, sim: TabletopSimulation, *, seed: int, style: Style = DEFAULT):
        self._sim, self._table = sim, sim.table
        self._kinematics = Kinematics()
        self._manner = style.draw(np.random.default_rng(seed))
        self._gripper, self._off = OPEN, 0.0
        self._way = style.draw_start(seed)

    def stray(self) -> Actions:
        """Yield the actions (6,) that bring the hand to where the demonstration starts; none by default."""
        if not self._way.any():
            return
        yield from self._rise()
        start = self._hand()[0] + self._way
        start[2] = max(start[2], READY_HEIGHT)
        yield from self._reach(lambda: self._solve(start, self._turn()), tolerance=0.10)

    def actions(self) -> Actions:
        """Yield the next clean action (6,), degrees and percent, until the caller stops asking."""
        for _ in range(ATTEMPTS):
            yield from self._pick()
            if self._holds_cube():
                yield from self._place()
            if self._cube_in_bowl():
                break
        while True:
            yield from self._stay(1)

    def _pick(self) -> Actions:
        """Come from above, close, lift."""
        self._gripper = OPEN
        yield from self._rise()
        yield from self._reach(lambda: self._above_cube(self._manner.approach_height), tolerance=0.06)
        yield from self._reach(self._funnel, tolerance=0.02)
        self._gripper = CLOSED
        yield from self._stay(CLOSING_STEPS)
        lifted = self._hand()[0] + [0.0, 0.0, READY_HEIGHT - GRASP_HEIGHT]
        yield from self._reach(lambda: self._solve(lifted, self._turn()), tolerance=0.10)

    def _place(self) -> Actions:
        """Carry over the bowl, lower, let go, rise.

        The closing jaw has pushed the cube against the fixed one: the hand aims as far off the bowl's middle.
        """
        self._off = self._in_hand(self._table.cube_pose[0])
        air = READY_HEIGHT + self._manner.carry_clearance - 0.03
        yield from self._reach(lambda: self._above_bowl(air), tolerance=0.06)
        yield from self._reach(lambda: self._above_bowl(RELEASE_HEIGHT), tolerance=0.04)
        self._gripper = OPEN
        yield from self._stay(OPENING_STEPS)
        yield from self._reach(lambda: self._above_bowl(READY_HEIGHT), tolerance=0.06)

    def _rise(self) -> Actions:
        """Bring the hand up in the plane it is in: low down it would sweep the table."""
        position, _ = self._hand()
        bearing = _bearing(position)
        outward = np.array([np.cos(bearing), np.sin(bearing)])
        up = np.array([*(SHOULDER + 0.20 * outward), READY_HEIGHT])
        yield from self._reach(lambda: self._solve(up, self._turn()), tolerance=0.25)

    def _above_cube(self, height: float) -> np.ndarray:
        position, _ = self._table.cube_pose
        return self._solve(np.array([*position[:2], GRASP_HEIGHT + height]), self._cube_turn())

    def _funnel(self) -> np.ndarray:
        """Return joints for the grasp, held back upwards by how far off its axis the hand is."""
        position, _ = self._table.cube_pose
        off = np.linalg.norm(self._hand()[0][:2] - position[:2])
        return self._above_cube(min(self._manner.approach_height, 4.0 * max(0.0, off - 0.004)))

    def _above_bowl(self, height: float) -> np.ndarray:
        target = self._table.bowl_position[:2] + self._manner.waypoint_offset
        turn = self._turn()
        direction = _bearing(self._table.bowl_position) + turn
        aside = pointing_down(direction)[:2, 0] * self._off
        return self._solve(np.array([*(target - aside), height]), turn)

    def _in_hand(self, position: np.ndarray) -> float:
        """Return how far a place is off the middle of the open jaws, along the way that they close (m)."""
        here, rotation = self._hand()
        return float((position - here) @ rotation[:, 0])

    def _cube_turn(self) -> float:
        """Return how far the jaws turn off the arm's plane to be square with the cube, at most 45 degrees."""
        position, rotation = self._table.cube_pose
        yaw = np.arctan2(rotation[1, 0], rotation[0, 0]) - _bearing(position)
        return float((yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4)

    def _turn(self) -> float:
        """Return how far the jaws are turned off the arm's plane now."""
        position, rotation = self._hand()
        turn = np.arctan2(rotation[1, 0], rotation[0, 0]) - _bearing(position)
        return float((turn + np.pi) % (2 * np.pi) - np.pi)

    def _hand(self) -> tuple[np.ndarray, np.ndarray]:
        return self._kinematics.pose(self._table.plant.angles())

    def _solve(self, position: np.ndarray, turn: float) -> np.ndarray:
        """Return joints (6,) that bring the hand there, with the gripper as it is to be."""
        rotation = pointing_down(_bearing(position) + turn)
        q, _ = self._kinematics.solve(position, rotation, self._table.plant.angles())
        return np.append(q, self._gripper)

    def _reach(self, target: Callable[[], np.ndarray], tolerance: float, patience: int = 110) -> Actions:
        """Yield actions until no joint is further than `tolerance` (rad) from ``target()``."""
        for _ in range(patience):
            q, wanted = self._table.plant.angles(), target()
            if np.abs(wanted - q)[:5].max() < tolerance:
                return
            yield self._towards(q, wanted)

    def _stay(self, steps: int) -> Actions:
        """Yield `steps` actions that keep the hand where it is while the gripper works."""
        held = self._table.plant.angles()
        for _ in range(steps):
            yield self._towards(self._table.plant.angles(), np.append(held[:5], self._gripper))

    def _towards(self, q: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Return the setpoint (6,) on the way from `q` to `wanted`; the gripper goes at its own pace."""
        way, lead = (wanted - q)[:5], LEAD * self._manner.limits.speed
        share = min(1.0, lead / max(np.abs(way).max(), 1e-9))
        return to_action(np.append(q[:5] + share * way, wanted[5]), self._table.calibration)

    def _holds_cube(self) -> bool:
        return self._table.touching_hand and self._table.cube_pose[0][2] > 2 * CUBE_HALF

    def _cube_in_bowl(self) -> bool:
        cube, bowl = self._table.cube_pose[0], self._table.bowl_position
        return bool(np.linalg.norm(cube[:2] - bowl[:2]) < 0.04 and cube[2] < BOWL_HEIGHT + CUBE_HALF)


class JointNoise:
    """Perturbs executed setpoints by `BurstNoise`. The gripper is never touched.

    `style.action_noise` is its standard deviation in units of `LEAD`.
    """

    def __init__(self, style: Style, rng: np.random.Generator):
        self._bursts = BurstNoise(style, rng, np.full(5, np.degrees(style.action_noise * LEAD)))

    def __call__(self, clean: np.ndarray) -> np.ndarray:
        """Return the action to execute in place of `clean` (6,)."""
        noise = self._bursts()
        return clean if noise is None else clean + np.append(noise, 0.0)


def to_action(angles: np.ndarray, calibration) -> np.ndarray:
    """Return joint angles of the model (6,) rad as a policy's action: degrees, and percent of the gripper."""
    steps = [to_steps(angle) for angle in angles]
    q = [
        calibration[name].to_fraction(step) if name == GRIPPER else calibration[name].to_angle(step)
        for name, step in zip(JOINTS, steps, strict=True)
    ]
    return to_policy(np.array(q)).astype(np.float64)


def demonstrate_tabletop(
    sim: TabletopSimulation,
    episode,
    *,
    seed: int,
    style: Style = DEFAULT,
    record: Record | None = None,
    step_limit: int | None = None,
) -> Demonstration:
    """Reset `sim` to `episode` and demonstrate its task until the first success or the step limit.

    As `vla.sim.demonstrators.demonstrator.demonstrate`, with joint setpoints in degrees and percent.
    """
    sim.reset(episode)
    demonstrator = TabletopDemonstrator(sim, seed=seed, style=style)
    noise = JointNoise(style, np.random.default_rng([seed, 1]))
    for action in demonstrator.stray():
        sim.step(action)

    def fault() -> str | None:
        return str(sim.supervisor.fault) if sim.faulty else None

    return carry_out(sim, demonstrator.actions(), noise, record, step_limit or sim.step_limit, fault)


def _bearing(position: np.ndarray) -> float:
    """Return the direction of a place, seen from the shoulder's axis (rad)."""
    return float(np.arctan2(position[1] - SHOULDER[1], position[0] - SHOULDER[0]))

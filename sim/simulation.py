"""One LIBERO scene: deterministic episodes, on-demand images, exact save and restore.

What an *observation* is. robosuite's clock samples the sensors once per control step, near its end
(after the standard reset: at the last substep but one), from kinematics that are one substep older
still. Here that instant is recorded as a few hundred numbers, and pixels are drawn from it only when
`LiberoSimulation.images` asks. So frames equal always-on rendering bit for bit although most are
never drawn, and the proprioception of `LiberoSimulation.state` belongs to the same instant.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from vla.contract import (
    ACTION_KEY,
    IMAGE_PREFIX,
    OSC_POSE_DELTA,
    STATE_KEY,
    Camera,
    Interface,
    Vector,
)
from vla.errors import UserError
from vla.sim.domain import CONTROL_RATE, build_domain, return_freed_memory, seeded
from vla.sim.episode import Episode
from vla.sim.rendering import OffscreenRenderer, find_backend
from vla.sim.suites import load_suite
from vla.sim.variation import VariedTask

#: The action that LIBERO's protocol repeats while the scene settles: no motion, gripper open.
SETTLE_ACTION = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
STATE_NAMES = ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right")
STATE_UNITS = ("m", "m", "m", "rad", "rad", "rad", "m", "m")
ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
_PLACEMENT_ATTEMPTS = 100


class SimulationError(RuntimeError):
    """The physics became unstable (NaN or huge numbers), or a scene could not be laid out."""


def sim_interface(image_size: int = 256) -> Interface:
    """What the simulator offers a policy: two square cameras, state (8), OSC_POSE deltas (7), 20 Hz."""
    return Interface(
        cameras=tuple(
            Camera(IMAGE_PREFIX + name, image_size, image_size) for name in LiberoSimulation.CAMERAS
        ),
        state=Vector(STATE_KEY, STATE_NAMES, STATE_UNITS),
        action=Vector(ACTION_KEY, ACTION_NAMES),
        action_space=OSC_POSE_DELTA,
        control_rate=float(CONTROL_RATE),
    )


@dataclass
class _Observation:
    """The instant that robosuite's clock sampled.

    `qpos` (nq,) are the positions that the kinematics of this instant came from, `lamp` the opacity
    of the sites that show a burning stove. The end-effector pose follows `qpos`; the fingers are read
    after the integration of the same substep, as robosuite does.
    """

    qpos: np.ndarray
    lamp: np.ndarray
    eef_position: np.ndarray
    eef_quaternion: np.ndarray  # xyzw
    fingers: np.ndarray

    def pack(self) -> np.ndarray:
        return np.concatenate([self.qpos, self.lamp, self.eef_position, self.eef_quaternion, self.fingers])

    @classmethod
    def unpack(cls, packed: np.ndarray, nq: int, lamps: int) -> _Observation:
        return cls(*np.split(packed.copy(), np.cumsum([nq, lamps, 3, 4])))


class LiberoSimulation:
    """One task of one suite, the only live simulation of its process.

    `image_size` is in pixels, `multisample` the anti-aliasing samples per pixel (4 is MuJoCo's default;
    0 is faster and visibly rougher). With `fast_step` redundant physics passes are skipped, where
    that is proved identical on this machine (`vla.sim.fast_step`). OpenGL starts at the first frame.

    Raises `UserError` for an unknown suite or task, or when another simulation lives in this process:
    two OpenGL contexts of one thread disturb each other, and one process per simulation is also what
    uses several cores.
    """

    CAMERAS = {"image": "agentview", "image2": "robot0_eye_in_hand"}  # noqa: RUF012 (interface constant)
    _live: weakref.ref | None = None

    def __init__(
        self,
        suite: str,
        task: int,
        *,
        image_size: int = 256,
        multisample: int = 4,
        fast_step: bool = True,
    ):
        self._claim_process()
        self.suite = load_suite(suite)
        self.task = self.suite.task(task)
        self.language = self.task.language
        self.image_size, self.multisample = image_size, multisample
        self._init_states = self.suite.init_states(task)
        self._variations = VariedTask.of(self.suite, task) if self.suite.is_varied else None
        find_backend()
        with seeded(0):
            self._domain = build_domain(str(self.task.bddl_path))
        self._find_changing_parts()
        self._use_own_observation()
        self._renderer: OffscreenRenderer | None = None
        self._frames: dict[str, np.ndarray] | None = None
        self.success = False
        self._step_domain = self._plain_step
        if fast_step:
            self._use_fast_step()
        LiberoSimulation._live = weakref.ref(self)

    # ------------------------------------------------------------------ episodes

    @property
    def step_limit(self) -> int:
        """Control steps of an episode in the OpenVLA-OFT protocol (`vla.sim.suites.STEP_LIMITS`)."""
        return self.suite.step_limit()

    def reset(self, episode: Episode, settle_steps: int = 10) -> None:
        """Start `episode` and let the scene settle for `settle_steps` control steps.

        Everything random is drawn from the episode's seed, and everything that a previous episode
        may have left behind is restored, so the same episode gives the same states in any order and
        in any process. Raises `UserError` if the episode belongs elsewhere, `SimulationError` if the
        scene cannot be laid out or becomes unstable.
        """
        if (episode.suite, episode.task) != (self.suite.name, self.task.index):
            raise UserError(
                f"The episode is for {episode.suite} task {episode.task}, this simulation is "
                f"{self.suite.name} task {self.task.index}; make one simulation per task."
            )
        state = None if episode.init_state is None else self._init_state(episode.init_state)
        self._restore_pristine_model()
        if self._variations is not None:
            self._vary(episode.seed)
        with seeded(episode.seed):
            self._lay_out()
        if state is not None:
            self._domain.sim.set_state_from_flattened(state)
            self._domain.sim.forward()
            self._domain._post_process()
            self._qpos_before[:] = self._data.qpos
            self._domain._update_observables(force=True)
        self._frames = None
        for _ in range(settle_steps):
            self._step_domain(SETTLE_ACTION)
        self._check_stable()
        self.success = bool(self._domain._check_success())

    def step(self, action: np.ndarray) -> bool:
        """Execute one 7-D action, each entry in [-1, 1], for 1/20 s and return `success`.

        The arm entries are a goal offset in the world frame (1 is 5 cm or 0.5 rad; clipped), of the
        gripper only the sign counts: -1 opens, +1 closes. Raises `ValueError` for a wrong shape or a
        non-finite entry, `SimulationError` if the physics becomes unstable.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"An action has 7 finite entries, got {action!r}.")
        self._frames = None
        self._step_domain(action)
        self._check_stable()
        self.success = bool(self._domain._check_success())
        return self.success

    # ------------------------------------------------------------------ observations

    def state(self) -> np.ndarray:
        """Return the proprioception (8,) float32: position 3 (m), axis-angle 3 (rad), fingers 2 (m)."""
        from robosuite.utils.transform_utils import quat2axisangle

        seen = self._observed
        axis_angle = quat2axisangle(seen.eef_quaternion.copy())  # clips its argument in place
        return np.concatenate([seen.eef_position, axis_angle, seen.fingers]).astype(np.float32)

    def images(self) -> dict[str, np.ndarray]:
        """Render the observed instant: camera name to (H, W, 3) uint8, rotated by 180 degrees.

        The rotation is the convention of every published LIBERO policy (OpenGL rows run upwards, and
        OpenVLA flips columns too), so images are left-right mirrored against the real scene. Asking
        again before the next step costs nothing.
        """
        if self._frames is None:
            if self._renderer is None:
                self._renderer = OffscreenRenderer(self._model, self.image_size, self.multisample)
            with self._posed_as_observed() as data:
                self._frames = {
                    name: np.ascontiguousarray(self._renderer.render(data, camera)[::-1, ::-1])
                    for name, camera in self.CAMERAS.items()
                }
        return dict(self._frames)

    # ------------------------------------------------------------------ save and restore

    def sim_state(self) -> np.ndarray:
        """Return everything that decides the future and the present observation, float64 (n,).

        MuJoCo's state with warm start, fixture poses, controller goal, gripper command, sensor clock
        and the observed instant. `set_sim_state` on any simulation of this task continues from it bit
        for bit, and `images` draws the frame that belongs to it.
        """
        controller, gripper = self._robot.controller, self._robot.gripper
        return np.concatenate(
            [
                self._physics_state(),
                self._model.body_pos[self._fixtures].ravel(),
                self._model.body_quat[self._fixtures].ravel(),
                self._model.site_rgba[self._lamps, 3],
                controller.goal_pos,
                controller.goal_ori.ravel(),
                np.broadcast_to(gripper.current_action, 2),  # one number before the first action
                [self._clock._time_since_last_sample, self._clock._sampled],
                self._observed.pack(),
            ]
        )

    def set_sim_state(self, x: np.ndarray) -> None:
        """Restore a state returned by `sim_state`; raise `ValueError` if its length does not fit.

        The goal of a varied task is not part of it; `reset` to the same episode first.
        """
        x = np.asarray(x, dtype=np.float64)
        if x.shape != self.sim_state().shape:
            raise ValueError(
                f"A state of {self.suite.name} task {self.task.index} has {self.sim_state().size} numbers, "
                f"got {x.shape}."
            )
        import mujoco

        fixtures, lamps, nq = len(self._fixtures), len(self._lamps), self._model.nq
        sizes = [self._physics_state().size, 3 * fixtures, 4 * fixtures, lamps, 3, 9, 2, 2]
        physics, position, quaternion, lamp, goal, orientation, grip, clock, observed = np.split(
            x, np.cumsum(sizes)
        )
        mujoco.mj_setState(self._model, self._data, physics, self._state_parts)
        self._model.body_pos[self._fixtures] = position.reshape(-1, 3)
        self._model.body_quat[self._fixtures] = quaternion.reshape(-1, 4)
        self._model.site_rgba[self._lamps, 3] = lamp
        mujoco.mj_forward(self._model, self._data)
        mujoco.mj_setState(self._model, self._data, physics, self._state_parts)  # forward may touch it
        controller, gripper = self._robot.controller, self._robot.gripper
        controller.goal_pos, controller.goal_ori = goal.copy(), orientation.reshape(3, 3).copy()
        controller.new_update = True
        gripper.current_action = grip.copy()
        self._clock._time_since_last_sample, self._clock._sampled = float(clock[0]), bool(clock[1])
        self._observed = _Observation.unpack(observed, nq, lamps)
        self._frames = None
        self.success = bool(self._domain._check_success())

    # ------------------------------------------------------------------ access and life time

    @property
    def env(self):
        """The LIBERO domain (robosuite's environment): privileged state for demonstrators and tests."""
        return self._domain

    def close(self) -> None:
        """Free the renderer and the model; afterwards another simulation may be made."""
        if self._domain is None:
            return
        if self._renderer is not None:
            self._renderer.close()
        self._domain.close()
        self._domain = self._robot = self._clock = self._step_domain = None
        self._model = self._data = self._drawing = self._renderer = None
        return_freed_memory()
        if LiberoSimulation._live is not None and LiberoSimulation._live() is self:
            LiberoSimulation._live = None

    def __enter__(self) -> LiberoSimulation:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ------------------------------------------------------------------ inside

    @staticmethod
    def _claim_process() -> None:
        live = LiberoSimulation._live and LiberoSimulation._live()
        if live is not None:
            raise UserError(
                f"A simulation of {live.suite.name} task {live.task.index} is alive in this process; call "
                "close() on it first, or use another process (one simulation per process)."
            )

    def _find_changing_parts(self) -> None:
        """Note what differs between episodes of one model: fixture bodies and the stove's lamps."""
        import mujoco

        domain = self._domain
        self._robot = domain.robots[0]
        self._model, self._data = domain.sim.model._model, domain.sim.data._data
        self._drawing = mujoco.MjData(self._model)
        bodies = [fixture.root_body for fixture in domain.fixtures_dict.values()]
        names = set(
            mujoco.mj_id2name(self._model, mujoco.mjtObj.mjOBJ_BODY, i) for i in range(self._model.nbody)
        )
        self._fixtures = np.array(
            [domain.sim.model.body_name2id(body) for body in bodies if body in names], dtype=int
        )
        self._lamps = np.array(
            [
                domain.sim.model.site_name2id(site)
                for name in getattr(domain, "visualization_sites_list", ())
                for site, _ in domain.get_object(name).object_properties["vis_site_names"].values()
            ],
            dtype=int,
        )
        state = mujoco.mjtState
        self._state_parts = (
            int(state.mjSTATE_FULLPHYSICS) | int(state.mjSTATE_WARMSTART) | int(state.mjSTATE_CTRL)
        )

    def _use_own_observation(self) -> None:
        """Replace robosuite's sensors by one that records the instant; its clock stays robosuite's."""
        from robosuite.utils.observables import Observable, sensor

        self._qpos_before = self._data.qpos.copy()
        self._finger_addresses = list(self._robot._ref_gripper_joint_pos_indexes)
        self._eef_body = self._domain.sim.model.body_name2id(self._robot.robot_model.eef_name)

        @sensor(modality="instant")
        def observe(_cache) -> float:
            quaternion = self._data.xquat[self._eef_body]
            self._observed = _Observation(
                qpos=self._qpos_before.copy(),
                lamp=self._model.site_rgba[self._lamps, 3],
                eef_position=self._data.site_xpos[self._robot.eef_site_id].copy(),
                eef_quaternion=quaternion[[1, 2, 3, 0]],
                fingers=self._data.qpos[self._finger_addresses],
            )
            return 0.0

        self._clock = Observable("instant", observe, sampling_rate=CONTROL_RATE)
        self._domain._observables.clear()
        self._domain._observables["instant"] = self._clock

    def _use_fast_step(self) -> None:
        from vla.sim.fast_step import FastStep, is_identical_here

        fast = FastStep(self._domain, self._qpos_before)

        if is_identical_here(fast, self._plain_step, self._roll_out):
            self._step_domain = fast

    def _init_state(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self._init_states):
            raise UserError(
                f"{self.suite.name} task {self.task.index} has initial states 0 to "
                f"{len(self._init_states) - 1}, not {index}."
            )
        return self._init_states[index]

    def _restore_pristine_model(self) -> None:
        """Undo what episodes change outside MuJoCo's state.

        Object placement on a fixture reads site positions and takes the fixture to be where the XML
        puts it; a soft reset would otherwise add the previous episode's pose to the new one.
        """
        for name, value in self._domain.pristine.items():
            getattr(self._model, name)[:] = value
        self._robot.gripper.current_action = np.zeros(2)

    def _vary(self, seed: int) -> None:
        """Give the domain the goal and the placements of the variation that `seed` draws."""
        variation = self._variations.draw(seed)
        self.language = variation.language
        self._domain.parsed_problem["initial_state"] = [list(state) for state in variation.initial_state]
        self._domain.parsed_problem["goal_state"] = [list(goal) for goal in variation.goal_state]
        self._domain.object_property_initializers.clear()
        self._domain._setup_placement_initializer(None)  # its argument, the arena, is not read

    def _lay_out(self) -> None:
        """Soft-reset the domain; draw again when objects cannot be placed without overlap."""
        from robosuite.utils.errors import RandomizationError

        for _ in range(_PLACEMENT_ATTEMPTS):
            with contextlib.suppress(RandomizationError):
                self._domain.reset()
                return
        raise SimulationError(
            f"{self.suite.name} task {self.task.index}: no free placement in {_PLACEMENT_ATTEMPTS} attempts."
        )

    def _plain_step(self, action: np.ndarray) -> None:
        """One control step exactly as robosuite's ``MujocoEnv.step`` does it."""
        domain = self._domain
        domain.timestep += 1
        for substep in range(int(domain.control_timestep / domain.model_timestep)):
            domain.sim.forward()
            domain._pre_action(action, substep == 0)
            self._qpos_before[:] = self._data.qpos
            domain.sim.step()
            domain._update_observables()
        domain.cur_time += domain.control_timestep
        domain._post_process()

    def _roll_out(self, step: Callable, actions: np.ndarray) -> np.ndarray:
        """Return the states (n, s) after each of `actions` (n, 7), from the first recorded state if any."""
        first = 0 if len(self._init_states) else None
        self.reset(Episode(self.suite.name, self.task.index, first, seed=0), settle_steps=0)
        states = []
        for action in actions:
            step(action)
            states.append(self.sim_state())
        return np.array(states)

    def _check_stable(self) -> None:
        """Raise `SimulationError` if MuJoCo warned of bad numbers or the state is not finite."""
        import mujoco

        kinds = (
            mujoco.mjtWarning.mjWARN_BADQPOS,
            mujoco.mjtWarning.mjWARN_BADQVEL,
            mujoco.mjtWarning.mjWARN_BADQACC,
        )
        bad = [kind.name for kind in kinds if self._data.warning[kind].number]
        if bad or not (np.isfinite(self._data.qpos).all() and np.isfinite(self._data.qvel).all()):
            raise SimulationError(
                f"{self.suite.name} task {self.task.index}: the physics became unstable at "
                f"t = {self._data.time:.2f} s ({', '.join(bad) or 'non-finite state'})."
            )

    def _physics_state(self) -> np.ndarray:
        import mujoco

        state = np.empty(mujoco.mj_stateSize(self._model, self._state_parts))
        mujoco.mj_getState(self._model, self._data, state, self._state_parts)
        return state

    @contextlib.contextmanager
    def _posed_as_observed(self) -> Iterator:
        """Yield a second MjData whose kinematics are those of the observed instant."""
        import mujoco

        now = self._model.site_rgba[self._lamps, 3]
        self._model.site_rgba[self._lamps, 3] = self._observed.lamp
        self._drawing.qpos[:] = self._observed.qpos
        mujoco.mj_kinematics(self._model, self._drawing)
        mujoco.mj_comPos(self._model, self._drawing)
        mujoco.mj_camlight(self._model, self._drawing)
        try:
            yield self._drawing
        finally:
            self._model.site_rgba[self._lamps, 3] = now

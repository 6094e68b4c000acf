"""Inverse kinematics of the SO101 by damped least squares on MuJoCo's Jacobian.

With position error e_p and rotation error e_r = ½ Σ_i r_i × r*_i over the columns of the hand's rotation, one
step is  Δq = (JᵀWJ + λI)⁻¹ JᵀW e  with weights W, over the joints that are not pressed against a limit. Five
joints cannot reach every pose, and high up the wrist cannot turn the hand down: then the position counts, and
the hand leans.
"""

from __future__ import annotations

import mujoco
import numpy as np

from vla.robot_drivers.emulation.plant import MODEL

SITE = "grasp"
WEIGHTS = np.array([1.0, 1.0, 1.0, 0.01, 0.01, 0.01]) ** 2  # a radian counts like a centimetre
DAMPING = 1e-7
LARGEST_STEP = 0.3  # rad
MARGIN = np.radians(2.5)  # kept from the joint limits


class Kinematics:
    """Poses of the grasp site, between the jaws, and the joint angles (5,) rad that reach them."""

    def __init__(self):
        self._model = mujoco.MjModel.from_xml_path(str(MODEL))
        self._data = mujoco.MjData(self._model)
        self._site = self._model.site(SITE).id
        self._low, self._high = self._model.jnt_range[:5].T + np.array([[MARGIN], [-MARGIN]])
        self._jacobian = np.zeros((6, self._model.nv))

    def pose(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return position (3,) and rotation (3, 3) of the site; x closes the jaws, -z points along them."""
        self._data.qpos[:5] = q[:5]
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        site = self._data.site(self._site)
        return site.xpos.copy(), site.xmat.reshape(3, 3).copy()

    def solve(
        self, position: np.ndarray, rotation: np.ndarray, start: np.ndarray, steps: int = 60
    ) -> tuple[np.ndarray, float]:
        """Return the joint angles (5,) nearest to the pose, and the position error (m) that is left."""
        q = np.clip(start[:5], self._low, self._high)
        for _ in range(steps):
            error = self._error(q, position, rotation)
            step = self._step(error, np.zeros(5, bool))
            pressed = ((q <= self._low) & (step < 0)) | ((q >= self._high) & (step > 0))
            if pressed.any():
                step = self._step(error, pressed)
            step *= min(1.0, LARGEST_STEP / max(np.abs(step).max(), 1e-12))
            q = np.clip(q + step, self._low, self._high)
            if np.abs(step).max() < 1e-5:
                break
        return q, float(np.linalg.norm(self._error(q, position, rotation)[:3]))

    def _step(self, error: np.ndarray, fixed: np.ndarray) -> np.ndarray:
        """Return Δq (5,) for an error (6,), with the `fixed` joints (5,) bool left where they are."""
        jacobian = self._jacobian[:, :5] * ~fixed
        weighted = jacobian.T * WEIGHTS
        return np.linalg.solve(weighted @ jacobian + DAMPING * np.eye(5), weighted @ error)

    def _error(self, q: np.ndarray, position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        """Return the error (6,) at `q` and leave the Jacobian of the site in place."""
        here, turned = self.pose(q)
        mujoco.mj_jacSite(self._model, self._data, self._jacobian[:3], self._jacobian[3:], self._site)
        rotation_error = 0.5 * np.cross(turned, rotation, axis=0).sum(axis=1)
        return np.concatenate([position - here, rotation_error])


def pointing_down(direction: float) -> np.ndarray:
    """Return the rotation (3, 3) of a hand that points down and closes along `direction` (rad, about z)."""
    cos, sin = np.cos(direction), np.sin(direction)
    return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])

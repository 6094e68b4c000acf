"""A box that the gripper may not leave: forward kinematics, and a bound on what braking can still touch.

With x(q) the position of the gripper's frame, J = ∂x/∂q, and s_i = v_i |v_i| / 2a_i the way that joint i
travels while it brakes, everything that braking can touch is x(q + r) with r_i between 0 and s_i, and

    x(q + r) = x(q) + J r + e,        |e_k| ≤ ē = ½ Σ_ij D_max(i,j) |s_i| |s_j|

because ∂²x/∂q_i∂q_j = ω_i × (ω_j × (x − p_j)) for hinges i before j, and D_j bounds |x − p_j|. So braking
from (q, v), however irregularly it is stepped, stays inside [lower, upper] if for every axis k

    x_k + Σ_i max(J_ki s_i, 0) + ē ≤ upper_k    and    x_k + Σ_i min(J_ki s_i, 0) − ē ≥ lower_k

The box bounds one point, the frame between the jaws, and no elbow; jaws reach beyond it. MuJoCo is imported
where a box is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vla.errors import UserError

from .driver import DriverInfo

MODELS = {"so101": (Path(__file__).parent / "emulation" / "so101.xml", "grasp")}
"""By the arm's name: its MuJoCo model, whose joints are named and counted as the driver's, and the site."""

SKIN = 0.002
"""Metres inside the box to which a setpoint outside it is drawn: sliding along a wall needs room to brake."""

ROUNDING = 1e-9  # m
DRAWS = 4
DAMPING = 1e-4  # m², against leaps of joints that hardly move the gripper

AXES = ("x", "y", "z")


def corners(bounds: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and the upper corner, (3,) each, of ``(x0, x1, y0, y1, z0, z1)``.

    Raises `UserError` for bounds that are no box.
    """
    numbers = np.array(bounds, float)
    if numbers.shape != (6,) or not np.isfinite(numbers).all():
        raise UserError("A workspace is six numbers in metres: x0 x1 y0 y1 z0 z1.")
    lower, upper = numbers[::2], numbers[1::2]
    thin = [axis for axis, size in zip(AXES, upper - lower, strict=True) if size < 4 * SKIN]
    if thin:
        raise UserError(
            f"The workspace is empty or too thin along {', '.join(thin)}: give x0 x1 y0 y1 z0 z1 in metres,"
            f" each pair rising by at least {4 * SKIN:g}."
        )
    return lower, upper


class GripperKinematics:
    """Where the gripper's frame is, in metres: x forwards from the base, y to its left, z up from its foot.

    Raises `UserError` for an arm without a model, or one that is not a chain of hinges.
    """

    def __init__(self, info: DriverInfo):
        if info.name not in MODELS:
            raise UserError(
                f"There is no kinematic model of '{info.name}': a workspace box is possible for"
                f" {', '.join(MODELS)}."
            )
        import mujoco

        path, site = MODELS[info.name]
        self._mujoco, self._model = mujoco, mujoco.MjModel.from_xml_path(str(path))
        self._data = mujoco.MjData(self._model)  # scratch: nothing is remembered in it
        self._site = self._model.site(site).id
        self._joints = [self._model.joint(joint.name).id for joint in info.joints]
        self._moves = np.array([joint.kind != "gripper" for joint in info.joints])
        self._dofs = self._model.jnt_dofadr[self._joints]
        self.distances = self._distances()

    def __call__(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the frame's position x (3,) at joint positions `q` (J,), and J = ∂x/∂q (3, J)."""
        addresses = self._model.jnt_qposadr[self._joints]
        self._data.qpos[addresses[self._moves]] = q[self._moves]
        self._mujoco.mj_kinematics(self._model, self._data)
        self._mujoco.mj_comPos(self._model, self._data)
        jacobian = np.zeros((3, self._model.nv))
        self._mujoco.mj_jacSite(self._model, self._data, jacobian, None, self._site)
        return self._data.site_xpos[self._site].copy(), jacobian[:, self._dofs]

    def _distances(self) -> np.ndarray:
        """Return D (J,): the sum of the links beyond each joint; 0 for joints that do not move the frame."""
        model, found = self._model, np.zeros(len(self._joints))
        reach, body = float(np.linalg.norm(model.site_pos[self._site])), int(model.site_bodyid[self._site])
        while body != 0:
            for joint in range(model.body_jntadr[body], model.body_jntadr[body] + model.body_jntnum[body]):
                if joint not in self._joints or model.jnt_type[joint] != self._mujoco.mjtJoint.mjJNT_HINGE:
                    raise UserError(f"Joint '{model.joint(joint).name}' of the model is no hinge of the arm.")
                found[self._joints.index(joint)] = reach + np.linalg.norm(model.jnt_pos[joint])
            reach += float(np.linalg.norm(model.body_pos[body]))
            body = int(model.body_parentid[body])
        return found


class Workspace:
    """The box of one arm. `bounds` are ``(x0, x1, y0, y1, z0, z1)`` in metres.

    Raises `UserError` for bounds that are no box.
    """

    def __init__(self, bounds: Sequence[float], info: DriverInfo):
        self.lower, self.upper = corners(bounds)
        self.kinematics = GripperKinematics(info)
        self._acceleration = info.acceleration
        reach = self.kinematics.distances  # the distal of two joints is the one that reaches less far
        self._curvature = np.minimum(reach[:, None], reach)

    @property
    def moves(self) -> np.ndarray:
        """Which joints move the frame, (J,) bool: not the gripper's own."""
        return self.kinematics.distances > 0

    def distance(self, q: np.ndarray) -> float:
        """Return how far the frame is outside the box at `q` (J,), in metres; 0 inside."""
        x, _ = self.kinematics(q)
        return float(np.linalg.norm(np.clip(x, self.lower, self.upper) - x))

    def holds_braking(self, q: np.ndarray, v: np.ndarray) -> bool:
        """Return whether the frame certainly stays inside while all joints brake from `q`, `v` (J,) each."""
        x, jacobian = self.kinematics(q)
        travel = v * np.abs(v) / (2 * self._acceleration)
        ways = jacobian * travel
        bend = 0.5 * np.abs(travel) @ self._curvature @ np.abs(travel) + ROUNDING
        high = x + np.maximum(ways, 0.0).sum(axis=1) + bend
        low = x + np.minimum(ways, 0.0).sum(axis=1) - bend
        return bool((high <= self.upper).all() and (low >= self.lower).all())

    def draw_in(self, q: np.ndarray, lowest: np.ndarray, highest: np.ndarray) -> np.ndarray:
        """Return a position near `q` (J,), within the joints' limits, that lies in the box or nearer to it.

        Damped Gauss-Newton steps Δq = Jᵀ (J Jᵀ + μ)⁻¹ Δx towards the nearest point of the box, so that a
        setpoint behind a wall is followed along the wall.
        """
        for _ in range(DRAWS):
            x, jacobian = self.kinematics(q)
            if not (np.clip(x, self.lower, self.upper) - x).any():
                return q
            gap = np.clip(x, self.lower + SKIN, self.upper - SKIN) - x
            step = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + DAMPING * np.eye(3), gap)
            q = np.clip(q + step, lowest, highest)
        return q

    def describe(self, q: np.ndarray) -> str:
        """Return where the frame is at `q` (J,), and how far outside that is, in words."""
        where = ", ".join(
            f"{axis} {1e3 * it:.0f}" for axis, it in zip(AXES, self.kinematics(q)[0], strict=True)
        )
        outside = self.distance(q)
        return f"gripper at {where} mm" + (f", {math.ceil(1e3 * outside)} mm outside" if outside else "")

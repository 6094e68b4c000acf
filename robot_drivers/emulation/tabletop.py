"""The tabletop scene: an emulated SO101, a cube and a bowl; "pick up the cube and place it in the bowl".

Everything random is drawn from the seed of `Tabletop.reset`: where cube and bowl stand, how the cube is
turned, and a small deviation of the arm from its rest pose. `Tabletop.success` is the goal: the cube rests in
the bowl, and the hand has let go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np

from ..so101.driver import so101_info
from .plant import MotorServo, Plant, emulated_calibration, motor_servos, to_angle

SCENE = Path(__file__).with_name("tabletop.xml")
INSTRUCTION = "pick up the cube and place it in the bowl"
CAMERAS = ("top", "wrist")

CUBE_REACH, CUBE_BEARING = (0.18, 0.25), math.radians(40)
"""Where the cube may stand, seen from the shoulder's axis: metres, and radians to either side."""
BOWL_REACH, BOWL_BEARING = (0.19, 0.25), math.radians(45)
APART = 0.115
"""Metres between the centres of cube and bowl, at least."""
HAND, CUBE_OFF_HAND, BOWL_OFF_HAND = (0.19, 0.0), 0.05, 0.085
"""Where the jaws of the resting arm end, and how far from there cube and bowl must be, metres."""
SHOULDER = (0.0388, 0.0)
"""Where the axis of the shoulder stands, metres."""

CUBE_HALF = 0.015
REST_SPREAD = math.radians(1.5)
"""Standard deviation of the arm's joints from the rest pose at a reset, radians."""

BOWL_INSIDE = 0.030
"""A cube in the bowl has its centre within so many metres of the bowl's axis."""
BOWL_HEIGHT = 0.034
STILL = (0.02, 0.6)
"""A cube at rest is slower than this: m/s and rad/s."""


@dataclass(frozen=True)
class Layout:
    """Where things stand: `cube` (x, y, yaw), `bowl` (x, y), metres and radians; `arm` (6,) joint angles."""

    cube: tuple[float, float, float]
    bowl: tuple[float, float]
    arm: tuple[float, ...]


class Tabletop:
    """The scene with its arm. `servos` are on the bus, `tick` lets time pass.

    `calibration` is what the arm's servos carry. The arm starts at the driver's rest pose, without torque.
    """

    def __init__(self, seed: int = 0):
        self.model = mujoco.MjModel.from_xml_path(str(SCENE))
        self.data = mujoco.MjData(self.model)
        self.calibration = emulated_calibration(self.model)
        self.rest = self._rest_angles()
        self._cube, self._bowl = (self.model.joint(name) for name in ("cube", "bowl"))
        self._cube_geom = self.model.geom("cube").id
        self._bowl_geoms = self._geoms_below("bowl")
        self._hand_geoms = self._geoms_below("gripper")
        self.plant = Plant(self.model, self.data, motor_servos(self.calibration))
        self.reset(seed)

    @property
    def servos(self) -> list[MotorServo]:
        """The arm's servos, in the order of the joints."""
        return self.plant.servos

    def reset(self, seed: int) -> Layout:
        """Put new servos, arm, cube and bowl where `seed` says; return the layout."""
        layout = self.layout(seed)
        mujoco.mj_resetData(self.model, self.data)
        self.plant.servos, self.plant.payload = motor_servos(self.calibration), 0.0
        self.arrange(layout)
        self.plant.pose(layout.arm)
        return layout

    def layout(self, seed: int) -> Layout:
        """Draw a layout; cube, bowl and the resting hand do not touch."""
        rng = np.random.default_rng([seed, 0x50101])
        while True:
            cube = _polar(rng.uniform(*CUBE_REACH), rng.uniform(-CUBE_BEARING, CUBE_BEARING))
            bowl = _polar(rng.uniform(*BOWL_REACH), rng.uniform(-BOWL_BEARING, BOWL_BEARING))
            clear = math.dist(cube, HAND) >= CUBE_OFF_HAND and math.dist(bowl, HAND) >= BOWL_OFF_HAND
            if clear and math.dist(cube, bowl) >= APART:
                break
        yaw = float(rng.uniform(-math.pi / 4, math.pi / 4))  # a quarter turn looks the same
        arm = self.rest + REST_SPREAD * np.clip(rng.normal(size=len(self.rest)), -2, 2)
        return Layout((*cube, yaw), bowl, tuple(np.clip(arm, *self._limits()).tolist()))

    def arrange(self, layout: Layout) -> None:
        """Put cube and bowl in their places; the arm stays as it is."""
        x, y, yaw = layout.cube
        self._place(self._cube, [x, y, CUBE_HALF, math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)])
        self._place(self._bowl, [*layout.bowl, 0.0, 1.0, 0.0, 0.0, 0.0])
        mujoco.mj_forward(self.model, self.data)

    def tick(self, dt: float) -> None:
        """Let `dt` seconds pass."""
        self.plant.tick(dt)

    @property
    def success(self) -> bool:
        """Whether the cube rests in the bowl and the hand has let go."""
        cube, bowl = self.cube_pose[0], self.bowl_position
        inside = math.dist(cube[:2], bowl[:2]) < BOWL_INSIDE and 0 < cube[2] - bowl[2] < BOWL_HEIGHT
        start = int(self._cube.dofadr[0])
        velocity = self.data.qvel[start : start + 6]
        still = np.linalg.norm(velocity[:3]) < STILL[0] and np.linalg.norm(velocity[3:]) < STILL[1]
        return bool(inside and still and self.touching_bowl and not self.touching_hand)

    @property
    def cube_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) and rotation (3, 3) of the cube in the world."""
        body = self.data.body("cube")
        return body.xpos.copy(), body.xmat.reshape(3, 3).copy()

    @property
    def bowl_position(self) -> np.ndarray:
        """The middle of the bowl's foot, (3,)."""
        return self.data.body("bowl").xpos.copy()

    @property
    def touching_hand(self) -> bool:
        """Whether any part of the hand touches the cube."""
        return self._touches(self._hand_geoms)

    @property
    def touching_bowl(self) -> bool:
        """Whether the cube touches the bowl."""
        return self._touches(self._bowl_geoms)

    def _touches(self, geoms: frozenset[int]) -> bool:
        pairs = self.data.contact.geom.tolist()
        return any(
            (a == self._cube_geom and b in geoms) or (b == self._cube_geom and a in geoms) for a, b in pairs
        )

    def _geoms_below(self, body: str) -> frozenset[int]:
        """Return the geoms of a body and of all that hang on it."""
        bodies = {self.model.body(body).id}
        for i in range(self.model.nbody):  # parents come before their children
            if int(self.model.body_parentid[i]) in bodies:
                bodies.add(i)
        return frozenset(i for i in range(self.model.ngeom) if int(self.model.geom_bodyid[i]) in bodies)

    def _place(self, joint, pose: list[float]) -> None:
        """Put a free body at rest at `pose`: position and quaternion."""
        start, dof = int(joint.qposadr[0]), int(joint.dofadr[0])
        self.data.qpos[start : start + 7] = pose
        self.data.qvel[dof : dof + 6] = 0.0

    def _rest_angles(self) -> np.ndarray:
        """Return the driver's rest pose as joint angles of the model, (6,) rad."""
        info = so101_info(self.calibration)
        low, high = self._limits()
        return low + (np.array(info.rest) - info.lower) / (info.upper - info.lower) * (high - low)

    def _limits(self) -> np.ndarray:
        """Return the calibrated limits as joint angles of the model, (2, 6) rad."""
        ranges = [(to_angle(it.range_min), to_angle(it.range_max)) for it in self.calibration.values()]
        return np.array(ranges).T


def _polar(reach: float, bearing: float) -> tuple[float, float]:
    return SHOULDER[0] + reach * math.cos(bearing), SHOULDER[1] + reach * math.sin(bearing)

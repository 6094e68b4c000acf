"""What is where: the privileged state of one simulation, read from the MuJoCo model and the BDDL goal.

Nothing here knows an object by name or category. An *entity* is any object, fixture or work surface of the
problem; its shape is the set of its collision boxes, and a *region* is a site that a predicate refers to.
All lengths are metres, all frames are world frames unless the name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mujoco
import numpy as np

SPACING = 0.006
"""Distance between surface samples, metres: fine enough that no finger (21 mm wide) slips between two."""


@dataclass(frozen=True)
class Pose:
    """A rigid transform: `position` (3,) in metres and `rotation` (3, 3)."""

    position: np.ndarray
    rotation: np.ndarray

    def __matmul__(self, other: Pose) -> Pose:
        return Pose(self.position + self.rotation @ other.position, self.rotation @ other.rotation)

    def inverse(self) -> Pose:
        """Return the transform that undoes this one."""
        return Pose(-self.rotation.T @ self.position, self.rotation.T)

    def apply(self, points: np.ndarray) -> np.ndarray:
        """Map points (n, 3) from this frame to the world."""
        return points @ self.rotation.T + self.position


@dataclass(frozen=True)
class Cloud:
    """Surface samples of a shape: `points` (n, 3) and outward unit `normals` (n, 3)."""

    points: np.ndarray
    normals: np.ndarray

    def moved(self, pose: Pose) -> Cloud:
        """Return the cloud carried along by `pose`."""
        return Cloud(pose.apply(self.points), self.normals @ pose.rotation.T)

    @staticmethod
    def union(clouds: list[Cloud]) -> Cloud:
        """Return all samples of several clouds (an empty cloud for none)."""
        empty = np.zeros((0, 3))
        return Cloud(
            np.concatenate([c.points for c in clouds] or [empty]),
            np.concatenate([c.normals for c in clouds] or [empty]),
        )


@dataclass(frozen=True)
class Region:
    """An oriented box: centre pose, half sizes (3,) and the entity that carries it (None: the workspace)."""

    name: str
    pose: Pose
    half: np.ndarray
    parent: str | None

    def extent(self) -> np.ndarray:
        """Return half the axis-aligned size (3,), as LIBERO's ``In`` predicate computes it."""
        return np.abs(self.pose.rotation @ self.half)


@dataclass(frozen=True)
class Joint:
    """One articulation: value, range, world axis and anchor, and the body that it moves."""

    name: str
    value: float
    range: tuple[float, float]
    axis: np.ndarray
    anchor: np.ndarray
    body: int
    slides: bool


def box_samples(half: np.ndarray, spacing: float = SPACING) -> Cloud:
    """Sample the surface of an axis-aligned box with half sizes (3,) on a regular grid."""
    clouds = []
    for axis in range(3):
        others = [i for i in range(3) if i != axis]
        grids = [
            np.linspace(-half[i], half[i], max(2, int(np.ceil(2 * half[i] / spacing)) + 1)) for i in others
        ]
        face = np.stack(np.meshgrid(*grids, indexing="ij"), -1).reshape(-1, 2)
        for sign in (-1.0, 1.0):
            points, normals = np.zeros((len(face), 3)), np.zeros((len(face), 3))
            points[:, others], points[:, axis], normals[:, axis] = face, sign * half[axis], sign
            clouds.append(Cloud(points, normals))
    return Cloud.union(clouds)


def corridor(points: np.ndarray, start: np.ndarray, goal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how far along (0 to 1) and how far aside (metres) of the level way each point (n, 3) is."""
    way = goal[:2] - start[:2]
    along = ((points[:, :2] - start[:2]) @ way / max(way @ way, 1e-9)).clip(0, 1)
    return along, np.linalg.norm(points[:, :2] - start[:2] - along[:, None] * way, axis=1)


class Scene:
    """Privileged, always current view of a simulation.

    `sim` needs only ``env`` (the LIBERO problem) and ``success``; geometry is cached in body frames, so it
    stays valid while things move.
    """

    def __init__(self, sim) -> None:
        self.sim = sim
        self.env = sim.env
        self.model: mujoco.MjModel = self.env.sim.model._model
        self.data: mujoco.MjData = self.env.sim.data._data
        self._bodies: dict[str, list[int]] = {}
        self._samples: dict[int, Cloud] = {}
        self._hand_site = self.model.site("gripper0_grip_site").id
        self._finger_qpos = [self.model.joint(f"gripper0_finger_joint{i}").qposadr[0] for i in (1, 2)]

    # -- the robot ---------------------------------------------------------------------------------

    @property
    def hand(self) -> Pose:
        """Pose of the grip site: x is the closing axis, z points out of the palm."""
        return Pose(
            self.data.site_xpos[self._hand_site].copy(),
            self.data.site_xmat[self._hand_site].reshape(3, 3).copy(),
        )

    @property
    def gripper_width(self) -> float:
        """Distance between the finger pads, metres (0 closed, 0.08 open)."""
        first, second = self.data.qpos[self._finger_qpos]
        return float(first - second)

    def finger_bodies(self, side: int) -> set[int]:
        """Return the bodies of finger 1 or 2."""
        return self._fingers[side]

    @cached_property
    def _fingers(self) -> dict[int, set[int]]:
        roots = {1: "gripper0_leftfinger", 2: "gripper0_rightfinger"}
        return {side: set(self._subtree(self.model.body(name).id)) for side, name in roots.items()}

    @cached_property
    def base(self) -> np.ndarray:
        """Position (3,) of the robot's base."""
        return self.data.body("robot0_base").xpos.copy()

    @cached_property
    def _robot_bodies(self) -> frozenset[int]:
        names = (self.model.body(i).name for i in range(self.model.nbody))
        return frozenset(
            i for i, name in enumerate(names) if name.startswith(("robot0", "gripper0", "mount0"))
        )

    # -- entities ----------------------------------------------------------------------------------

    @cached_property
    def goal(self) -> list[tuple[str, ...]]:
        """The conjunction of predicates to make true, e.g. ``("on", "bowl_1", "plate_1")``."""
        return [tuple(predicate) for predicate in self.env.parsed_problem["goal_state"]]

    def holds(self, predicate: tuple[str, ...]) -> bool:
        """Evaluate one predicate of the goal now."""
        return bool(self.env._eval_predicate(list(predicate)))

    @cached_property
    def movable(self) -> tuple[str, ...]:
        """Names of the free objects."""
        return tuple(self.env.objects_dict)

    def bodies(self, name: str) -> list[int]:
        """Return the body ids of an entity, root first."""
        if name not in self._bodies:
            self._bodies[name] = self._subtree(self.model.body(self.env.get_object(name).root_body).id)
        return self._bodies[name]

    def _subtree(self, root: int) -> list[int]:
        found = [root]
        for body in range(root + 1, self.model.nbody):
            if self.model.body_parentid[body] in found:
                found.append(body)
        return found

    def body_pose(self, body: int) -> Pose:
        """Return the current pose of a body."""
        return Pose(self.data.xpos[body].copy(), self.data.xmat[body].reshape(3, 3).copy())

    def pose(self, name: str) -> Pose:
        """Return the pose of the frame whose origin LIBERO's predicates look at."""
        return self.body_pose(self.env.obj_body_id[name])

    def velocity(self, name: str) -> float:
        """Return the speed of an entity's origin, m/s."""
        return float(np.linalg.norm(self.data.cvel[self.env.obj_body_id[name]][3:]))

    def cloud(self, name: str) -> Cloud:
        """Sample the collision surface of an entity where it is now, without samples inside its own boxes."""
        return self.cloud_of(self.bodies(name))

    def cloud_of(self, bodies: list[int]) -> Cloud:
        """Sample the collision surface of some bodies where they are now."""
        return Cloud.union([self._body_samples(b).moved(self.body_pose(b)) for b in bodies])

    def obstacles(self, *exclude: str) -> Cloud:
        """Sample everything that can be hit, apart from the robot and the entities named in `exclude`."""
        skip = set(self._robot_bodies)
        for name in exclude:
            skip.update(self.bodies(name))
        return self.cloud_of([b for b in range(self.model.nbody) if b not in skip])

    def _body_samples(self, body: int) -> Cloud:
        if body not in self._samples:
            first = self.model.body_geomadr[body]
            geoms = range(first, first + self.model.body_geomnum[body]) if first >= 0 else ()
            solid = [g for g in geoms if self.model.geom_contype[g] or self.model.geom_conaffinity[g]]
            self._samples[body] = self._outer_surface(solid)
        return self._samples[body]

    def _outer_surface(self, geoms: list[int]) -> Cloud:
        """Union of the geoms' surfaces in the body frame, without the samples that another geom swallows."""
        boxes = [self._box_in_body(g) for g in geoms]
        clouds = []
        for i, (pose, half) in enumerate(boxes):
            large = np.sort(half)[1] > 0.3  # a table or the floor: coarser, still denser than a finger
            cloud = box_samples(half, 2 * SPACING if large else SPACING).moved(pose)
            keep = np.ones(len(cloud.points), bool)
            for j, (other, size) in enumerate(boxes):
                if i != j:
                    local = np.abs((cloud.points - other.position) @ other.rotation)
                    keep &= ~np.all(local < size - 1e-3, axis=1)
            clouds.append(Cloud(cloud.points[keep], cloud.normals[keep]))
        return Cloud.union(clouds)

    def _box_in_body(self, geom: int) -> tuple[Pose, np.ndarray]:
        """Return a geom as an oriented box in its body's frame (its bounding box where it is not a box).

        The infinite floor becomes a slab that reaches as far as the arm.
        """
        rotation = np.zeros(9)
        mujoco.mju_quat2Mat(rotation, self.model.geom_quat[geom])
        frame = Pose(self.model.geom_pos[geom].copy(), rotation.reshape(3, 3))
        centre, half = self.model.geom_aabb[geom][:3], self.model.geom_aabb[geom][3:]
        if self.model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_PLANE:
            centre, half = np.array([0.0, 0.0, -0.01]), np.array([0.8, 0.8, 0.01])
        return Pose(frame.apply(centre[None])[0], frame.rotation), half.copy()

    # -- regions and joints ------------------------------------------------------------------------

    def is_region(self, name: str) -> bool:
        """Return whether a predicate's argument is a site instead of an entity."""
        return name in self.env.object_sites_dict

    def on_surface(self, name: str) -> bool:
        """Return whether a predicate's argument is a patch of the work surface."""
        return self.is_region(name) and self.region(name).parent is None

    def region(self, name: str) -> Region:
        """Return the site that a predicate refers to, where it is now."""
        site = self.env.object_sites_dict[name]
        frame = Pose(self.data.site(name).xpos.copy(), self.data.site(name).xmat.reshape(3, 3).copy())
        return Region(name, frame, np.array(site.size, float), getattr(site, "parent_name", None))

    def joints(self, name: str) -> list[Joint]:
        """Return the articulations that a region (a drawer) or an entity (a door, a knob) depends on."""
        owner = self.env.object_sites_dict[name] if self.is_region(name) else self.env.get_object(name)
        return [self._joint(joint) for joint in getattr(owner, "joints", None) or ()]

    def is_drawer(self, name: str) -> bool:
        """Return whether a region moves with a sliding joint."""
        return self.is_region(name) and any(joint.slides for joint in self.joints(name))

    def wanted_value(self, name: str, state: str) -> float:
        """Return a joint value that makes a region or entity ``open``, ``close``, ``turnon`` or ``turnoff``.

        It lies a fifth of the way into LIBERO's range for the state, from where the joint is now.
        """
        owner = self.env.object_sites_dict[name] if self.is_region(name) else self.env.get_object(name)
        ranges = owner.object_properties["articulation"][f"default_{state}_ranges"]
        joint = self.joints(name)[0]
        near, far = sorted(ranges, key=lambda value: abs(value - joint.value))
        return float(np.clip(near + 0.2 * (far - near), *joint.range))

    def _joint(self, name: str) -> Joint:
        joint = self.model.joint(name)
        return Joint(
            name,
            float(self.data.joint(name).qpos[0]),
            (float(joint.range[0]), float(joint.range[1])),
            self.data.joint(name).xaxis.copy(),
            self.data.joint(name).xanchor.copy(),
            int(self.model.jnt_bodyid[joint.id]),
            bool(joint.type[0] == mujoco.mjtJoint.mjJNT_SLIDE),
        )

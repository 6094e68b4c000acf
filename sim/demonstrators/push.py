"""Push something flat over the work surface: rake it with the open fingers from behind, without lifting."""

from __future__ import annotations

import itertools

import numpy as np
from scipy.spatial.transform import Rotation

from .grasp import GraspError
from .hand import FINGER_HALF_WIDTH, FINGER_INNER, FINGER_TIP, hand_meets
from .motion import OPEN, UP, Actions, Limits, Tolerance, funnel, leaning, reach, servo
from .pick import clear_height, open_gripper
from .scene import Pose, Scene
from .style import Manner

FLAT = 0.03
"""Things lower than this, metres, offer only a slanted rim to pinch: they are pushed instead of lifted."""

LEANS = np.radians(np.arange(5, 56, 5))
"""Leans of the raking hand to try: its palm is above the object, away from what stands behind."""

TURNS = np.radians(np.arange(-30, 31, 5))
"""Turns of the cradle away from the pushing direction to try."""

STAND_OFF = 0.008
"""Metres behind the cradle at which the hand comes down."""

TIP_AIR = 0.002
"""Height of the fingertips above the surface, metres."""

SLIPPED = 0.03
"""Metres by which the entity may shift against the hand before it counts as lost."""


def is_dish(scene: Scene, name: str) -> bool:
    """Return whether the entity is lower than `FLAT` and too wide for the hand to span it."""
    across, along, height = np.ptp(scene.cloud(name).points, axis=0)
    return bool(height < FLAT and min(across, along) > 2 * (FINGER_INNER + FINGER_HALF_WIDTH))


def push(scene: Scene, name: str, predicate: tuple[str, ...], goal: np.ndarray, manner: Manner) -> Actions:
    """Push the entity `name` until `predicate` holds, its origin towards `goal` (3,).

    Ends early if it is lost. Two fingers behind it make a cradle, so that it does not
    turn away.
    """
    way = (goal - scene.pose(name).position) * (1.0 - UP)
    way /= np.linalg.norm(way)
    behind = cradle(scene, name, way)
    target = Pose(scene.pose(name).position + behind.position, behind.rotation)
    height = clear_height(scene, name, target, manner.approach_height)

    def entry() -> Pose:
        standing_off = Pose(scene.pose(name).position + behind.position - STAND_OFF * way, behind.rotation)
        return funnel(scene.hand, standing_off, behind.rotation[:, 2], height)

    yield from open_gripper(scene, manner)
    yield from reach(scene, entry, OPEN, manner.limits, tolerance=Tolerance(0.008, 0.08))
    limits = Limits(speed=0.7 * manner.limits.speed)
    for _ in range(150):
        hand, origin = scene.hand, scene.pose(name).position
        left = (goal - origin) * (1.0 - UP)
        shifted = (hand.position - origin - behind.position) * (1.0 - UP)
        if np.linalg.norm(shifted) > SLIPPED or scene.holds(predicate):
            return
        ahead = hand.position + left + 0.02 * way
        ahead[2] = origin[2] + behind.position[2]
        yield servo(hand, Pose(ahead, behind.rotation), OPEN, limits)


def cradle(scene: Scene, name: str, way: np.ndarray) -> Pose:
    """Return the hand pose, relative to the entity's origin, with both fingertips low behind it.

    Of the leans and turns that hit nothing, the most upright and straightest is taken.
    Raises `GraspError` when there is none.
    """
    origin = scene.pose(name).position
    obstacles = scene.obstacles(name).points
    obstacles = obstacles[np.linalg.norm(obstacles - origin, axis=1) < 0.4]
    for lean, turn in sorted(itertools.product(LEANS, TURNS), key=lambda pair: pair[0] + abs(pair[1])):
        pose = _behind(scene, name, Rotation.from_rotvec(turn * UP).as_matrix() @ way, lean)
        if pose is None:
            continue
        hand = Pose(origin + pose.position - STAND_OFF * way, pose.rotation)
        if not hand_meets(obstacles, hand, FINGER_INNER, 0.001):
            return pose
    raise GraspError(f"There is no room for the hand behind '{name}'.")


def _behind(scene: Scene, name: str, way: np.ndarray, lean: float) -> Pose | None:
    """Return the cradle for pushing along `way` with a hand that leans back, None if nothing touches it."""
    shape = scene.cloud(name).points - scene.pose(name).position
    along, across = shape @ way, np.cross(shape, way)[:, 2]
    touched = np.abs(np.abs(across) - FINGER_INNER - 0.005) < FINGER_HALF_WIDTH
    if not touched.any():
        return None
    trailing = along[touched].min() - FINGER_HALF_WIDTH - np.ptp(shape[:, 2]) * np.tan(lean)
    rotation = leaning(-way, lean, across=True)
    tip = trailing * way + (shape[:, 2].min() + TIP_AIR + FINGER_HALF_WIDTH * np.sin(lean)) * UP
    return Pose(tip - FINGER_TIP * rotation[:, 2], rotation)

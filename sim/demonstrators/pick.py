"""Pick up an object: line up, go in, close, lift."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from .grasp import Grasp
from .hand import FINGER_TIP
from .motion import CLOSE, OPEN, UP, Actions, Tolerance, funnel, reach, rotation_error, stay
from .scene import Pose, Scene, corridor
from .style import Manner

TOPPLED = 0.2
"""Radians by which an object may turn before its grasp is planned anew."""

HAND_RADIUS = 0.06
"""Metres around its axis that the lower part of the hand needs on its way."""


def holding(scene: Scene, name: str) -> bool:
    """Return whether both fingers touch the entity."""
    bodies = set(scene.bodies(name))
    touched = set()
    for contact in scene.data.contact[: scene.data.ncon]:
        pair = [scene.model.geom_bodyid[g] for g in contact.geom]
        for one, other in (pair, pair[::-1]):
            if one in bodies:
                touched |= {side for side in (1, 2) if other in scene.finger_bodies(side)}
    return touched == {1, 2}


class Hold:
    """Notices when a held entity is lost: not held for several steps in a row (contacts flicker)."""

    def __init__(self, scene: Scene, name: str, patience: int = 4) -> None:
        self._scene, self._name, self._patience = scene, name, patience
        self._missed = 0

    def lost(self) -> bool:
        """Look once per step; return whether the entity has slipped away."""
        self._missed = 0 if holding(self._scene, self._name) else self._missed + 1
        return self._missed >= self._patience


def close_gripper(scene: Scene, target: Pose, manner: Manner, most: int = 18) -> Actions:
    """Close until the fingers have stopped moving, so that they press before anything is lifted."""
    previous, still = np.inf, 0
    for step in range(most):
        width = scene.gripper_width
        still = still + 1 if previous - width < 3e-4 else 0
        if step > 3 and still >= 2:
            return
        previous = width
        yield from stay(scene, lambda: target, CLOSE, manner.limits, 1)


def clear_height(scene: Scene, name: str, target: Pose, height: float) -> float:
    """Return how high above `target` the hand must line up: `height`, or more if something is in its way."""
    points, start = scene.obstacles(name).points, scene.hand.position
    goal = target.position - height * target.rotation[:, 2]
    along, aside = corridor(points, start, goal)
    lowest = start[2] + along * (goal[2] - start[2]) - FINGER_TIP - 0.01
    blocking = points[(aside < HAND_RADIUS) & (along < 0.9) & (points[:, 2] > lowest)]
    if not len(blocking):
        return height
    return max(height, float(blocking[:, 2].max() + FINGER_TIP + 0.02 - target.position[2]))


def take(
    scene: Scene, name: str, grasp: Grasp, manner: Manner, lift: float = 0.03
) -> Generator[np.ndarray, None, bool]:
    """Grasp the entity `name`, lift it by `lift` and return whether it came along.

    Contacts do not tell: those of a thin rim between the fingers come and go.
    """
    planned = scene.pose(name).rotation

    def toppled() -> bool:
        return float(np.linalg.norm(rotation_error(scene.pose(name).rotation, planned))) > TOPPLED

    height = clear_height(scene, name, grasp.hand(scene.pose(name)), manner.approach_height)

    def entry() -> Pose:
        target = grasp.hand(scene.pose(name))
        return funnel(scene.hand, target, target.rotation[:, 2], height)

    yield from open_gripper(scene, manner)
    yield from reach(scene, entry, OPEN, manner.limits, until=toppled, tolerance=Tolerance(0.006, 0.08))
    if toppled():
        return False
    standing = scene.pose(name).position[2]
    yield from close_gripper(scene, grasp.hand(scene.pose(name)), manner)
    raised = scene.hand
    raised = Pose(raised.position + lift * UP, raised.rotation)
    yield from reach(
        scene, lambda: raised, CLOSE, manner.limits, tolerance=Tolerance(0.012, 0.2), patience=20
    )
    came_along = bool(scene.pose(name).position[2] - standing > lift / 5) or holding(scene, name)
    if not came_along:
        yield from open_gripper(scene, manner)
    return came_along


def open_gripper(scene: Scene, manner: Manner, width: float = 0.07) -> Actions:
    """Open in place until the fingers are at least `width` apart."""
    here = scene.hand
    for _ in range(10):
        if scene.gripper_width > width:
            return
        yield from stay(scene, lambda: here, OPEN, manner.limits, 1)

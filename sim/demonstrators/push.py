"""Push something flat that no grasp fits: closed fingertips inside its rim, on the side it has to go."""

from __future__ import annotations

import numpy as np

from .hand import FINGER_TIP
from .motion import CLOSE, DOWN, Actions, funnel, servo
from .scene import Pose, Scene
from .style import Manner

TIP_RADIUS = 0.021
"""Half the thickness of the closed fingertips, metres, with a little air."""

TIP_AIR = 0.002
"""Height of the fingertips above the surface they slide over, metres."""


def push(
    scene: Scene, name: str, predicate: tuple[str, ...], goal: np.ndarray, manner: Manner, patience: int = 200
) -> Actions:
    """Push the entity `name` until `predicate` holds, towards `goal` (3,) for its origin.

    The contact lies ahead of the centre, where the object follows the hand like a trailer. A hand that
    slips out of the rim is lifted and put back by the same rule.
    """
    direction = goal[:2] - scene.pose(name).position[:2]
    direction = np.append(direction / np.linalg.norm(direction), 0.0)
    contact = inside_rim(scene, name, direction)
    for _ in range(patience):
        if scene.holds(predicate):
            return
        hand = scene.hand
        point = Pose(scene.pose(name).position + contact, DOWN)
        offset = hand.position - point.position
        sideways = float(np.linalg.norm(offset[:2]))
        if sideways < 0.02 and offset[2] < 0.006:
            yield servo(hand, Pose(point.position + 0.06 * direction, DOWN), CLOSE, manner.limits)
        else:
            entry = funnel(hand, point, DOWN[:, 2], manner.approach_height)
            yield servo(hand, entry, CLOSE, manner.limits)


def inside_rim(scene: Scene, name: str, direction: np.ndarray) -> np.ndarray:
    """Return where the hand goes relative to the entity's origin (3,): low, just behind the leading rim."""
    shape = scene.cloud(name).points - scene.pose(name).position
    along, across = shape @ direction, np.cross(shape, direction)[:, 2]
    strip = (np.abs(across) < 0.012) & (along > 0)
    reach = along[strip].max()
    floor = shape[(np.abs(across) < TIP_RADIUS) & (np.abs(along - 0.5 * reach) < TIP_RADIUS), 2].max()
    wall = along[strip & (shape[:, 2] > floor + 2 * TIP_AIR)].min()
    return direction * (wall - TIP_RADIUS) + np.array([0.0, 0.0, floor + TIP_AIR + FINGER_TIP])

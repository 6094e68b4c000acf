"""Shape of the Panda hand in its grip-site frame, and whether it meets a point cloud.

x is the closing axis, y the fingers' width, z points out of the palm; metres, measured on the collision
meshes of robosuite's Panda gripper.
"""

from __future__ import annotations

import numpy as np

from .scene import Pose

FINGER_INNER = 0.0386
"""Distance from the hand's centre to a finger when open."""

FINGER_HALF_WIDTH = 0.0105
FINGER_TIP = 0.0092
PAD = (-0.0117, 0.0043)
PAD_HALF_WIDTH = 0.008
CLOSED_RADIUS = 0.021
"""Half the thickness of the closed fingertips, with a little air."""

PALM_HALF = (0.104, 0.033)
PALM_FRONT = -0.031
PALM_BACK = -0.16


def finger_thickness(z: np.ndarray) -> np.ndarray:
    """Return how thick a finger is at heights `z` of the hand frame: it tapers towards its tip."""
    return np.interp(z, [-0.026, FINGER_TIP], [0.026, 0.0145])


def hand_meets(points: np.ndarray, hand: Pose, opening: float, clearance: float = 0.004) -> bool:
    """Return whether a hand at that pose is within `clearance` of any of the points (n, 3).

    `opening` is half the distance between the fingers. The space between the fingers is not checked:
    that is where the object is.
    """
    local = (points - hand.position) @ hand.rotation
    x, y, z = np.abs(local[:, 0]), np.abs(local[:, 1]), local[:, 2]
    palm = (x < PALM_HALF[0] + clearance) & (y < PALM_HALF[1] + clearance)
    palm &= (z < PALM_FRONT + clearance) & (z > PALM_BACK)
    finger = (x > opening - clearance) & (x < opening + finger_thickness(z) + clearance)
    finger &= (y < FINGER_HALF_WIDTH + clearance) & (z < FINGER_TIP + clearance) & (z > PALM_FRONT - 0.03)
    return bool(np.any(palm | finger))

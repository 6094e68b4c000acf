"""Close a hinged door by pushing its outer face with closed fingers."""

from __future__ import annotations

import numpy as np

from .hand import CLOSED_RADIUS, FINGER_TIP
from .motion import CLOSE, DOWN, UP, Actions, Tolerance, funnel, reach, servo
from .scene import Pose, Scene
from .style import Manner

REACH_ALONG = 0.6
"""Where the door is pushed, as a fraction of its width from the hinge: short of any handle."""

GRIP_DEPTH = 0.03
"""How far the fingertips hang below the upper edge of the door, metres."""


def close_door(scene: Scene, name: str, manner: Manner) -> Actions:
    """Push the door of the entity `name` until ``close`` holds."""
    contact, inward = _contact(scene, name)

    def hand_pose(ahead: float) -> Pose:
        body = scene.body_pose(scene.joints(name)[0].body)
        return Pose(body.apply(contact[None])[0] + ahead * (body.rotation @ inward), DOWN)

    above = scene.hand
    above = Pose(np.array([*above.position[:2], hand_pose(0.0).position[2] + 0.1]), DOWN)
    yield from reach(scene, lambda: above, CLOSE, manner.limits, tolerance=Tolerance(0.03, 0.5), patience=40)
    yield from reach(
        scene,
        lambda: funnel(scene.hand, hand_pose(-0.025), -UP, 0.1),
        CLOSE,
        manner.limits,
        tolerance=Tolerance(0.015, 0.3),
    )
    for _ in range(160):
        if scene.holds(("close", name)):
            return
        yield servo(scene.hand, hand_pose(0.05), CLOSE, manner.limits)


def _contact(scene: Scene, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return hand position (3,) and pushing direction (3,), both in the door's body frame."""
    joint = scene.joints(name)[0]
    door = scene.cloud_of([joint.body]).points
    radial = (door.mean(0) - joint.anchor) * [1, 1, 0]
    width = np.linalg.norm(radial) * 2
    radial /= np.linalg.norm(radial)
    closing = scene.wanted_value(name, "close") - joint.value
    inward = np.sign(closing) * np.cross(joint.axis, radial)
    local = door - joint.anchor
    strip = np.abs(local @ radial - REACH_ALONG * width) < 0.02
    outer = (local[strip] @ inward).min()
    top = door[strip, 2].max()
    at = joint.anchor + REACH_ALONG * width * radial + (outer - CLOSED_RADIUS) * inward
    at[2] = top - GRIP_DEPTH + FINGER_TIP
    body = scene.body_pose(joint.body)
    return body.inverse().apply(at[None])[0], body.rotation.T @ inward

"""Open a drawer by its handle; close it by pushing its front."""

from __future__ import annotations

import numpy as np

from .grasp import GraspError, search
from .hand import FINGER_TIP
from .joint import work
from .motion import CLOSE, UP, Actions, Tolerance, funnel, leaning, reach, servo
from .place import release
from .scene import Cloud, Joint, Pose, Scene
from .style import Manner

HANDLE_DEPTH = 0.018
"""Metres, measured from the outermost point of a drawer, that count as its handle."""

TILTS = np.radians(np.arange(30, 91, 5))
"""How far the hand leans towards the front of the drawer; the gap behind a handle is too thin for less."""

PUSHING_TILT = np.radians(45)
"""Lean of the hand that pushes a drawer shut."""


def outward(scene: Scene, name: str) -> tuple[Joint, np.ndarray]:
    """Return the joint of a drawer and the unit vector along which it opens."""
    joint = scene.joints(name)[0]
    opened = max(joint.range, key=abs)
    return joint, joint.axis * np.sign(opened)


def handle(scene: Scene, joint: Joint, direction: np.ndarray) -> Cloud:
    """Return the samples of what stands out furthest at the front of a drawer."""
    front = scene.cloud_of([joint.body])
    along = front.points @ direction
    outer = along > along.max() - HANDLE_DEPTH
    return Cloud(front.points[outer], front.normals[outer])


def open_drawer(
    scene: Scene, name: str, manner: Manner, rng: np.random.Generator, amount: float | None = None
) -> Actions:
    """Pull the drawer with region `name` open, to the joint value `amount` (default: open as a predicate).

    Raises `GraspError` when the handle cannot be gripped.
    """
    joint, direction = outward(scene, name)
    grip, frame = handle(scene, joint, direction), scene.body_pose(joint.body)
    others = scene.obstacles().points
    on_grip = (others @ direction) > (grip.points @ direction).min() - 1e-6
    on_grip &= np.all(np.abs(others - grip.points.mean(0)) < np.ptp(grip.points, axis=0) / 2 + 1e-3, axis=1)
    rotations = [(leaning(-direction, tilt, across=False), 0.3 * tilt) for tilt in TILTS]
    found = search(grip, frame, others[~on_grip], rotations)
    if not found:
        raise GraspError(f"No hand pose can hold the handle of '{name}'.")

    def value() -> float:
        return scene.wanted_value(name, "open") if amount is None else amount

    yield from work(scene, name, found, value, manner, rng)


def close_drawer(scene: Scene, name: str, manner: Manner) -> Actions:
    """Push the drawer with region `name` shut with closed fingers.

    The hand leans in, its palm across, so that it stays clear of handles above and of the table.
    """
    joint, direction = outward(scene, name)
    front = handle(scene, joint, direction)
    middle = (front.points.min(0) + front.points.max(0)) / 2
    outer = (front.points @ direction).max()
    contact = middle + direction * (outer - middle @ direction)
    relative = scene.body_pose(joint.body).inverse().apply(contact[None])[0]

    facing = leaning(-direction, PUSHING_TILT, across=True)

    def target(ahead: float) -> Pose:
        at = scene.body_pose(joint.body).apply(relative[None])[0]
        return Pose(at + direction * ahead - FINGER_TIP * facing[:, 2], facing)

    def entry() -> Pose:
        return funnel(scene.hand, target(0.03), -UP, manner.approach_height + 0.06)

    yield from reach(scene, entry, CLOSE, manner.limits, tolerance=Tolerance(0.012, 0.25))
    for _ in range(80):
        if scene.holds(("close", name)):
            return
        yield servo(scene.hand, target(-0.04), CLOSE, manner.limits)
    yield from release(scene, manner)

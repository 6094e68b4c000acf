"""From a wanted hand pose to a 7-D OSC_POSE action, by proportional control.

The action is a function of the current pose error alone: no integrator, no trajectory clock. Executing a
perturbed action therefore never confuses the controller, and a network that sees the pose can imitate it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from .scene import Pose, Scene

OPEN, CLOSE = -1.0, 1.0
"""Gripper entry of an action."""

TRANSLATION_UNIT = 0.05
"""Metres of goal offset for a translation action of 1 (OSC_POSE's ``output_max``)."""

ROTATION_UNIT = 0.5
"""Radians of goal offset for a rotation action of 1."""

UP = np.array([0.0, 0.0, 1.0])

DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
"""Rotation of a hand that points straight down with LIBERO's start yaw (fingers close along world y)."""

MOST_BACK_TURN = np.radians(80)
"""Hand yaw is kept between minus this and half a turn more: the last joint has more room that way."""

EASY_REACH = 0.68
"""Horizontal distance from the base, metres, up to which a vertical hand works well."""

LEAN = 3.5
"""Radians of lean per metre beyond `EASY_REACH`."""

Actions = Iterator[np.ndarray]


@dataclass(frozen=True)
class Limits:
    """Bounds and gains of the servo: actions never exceed `speed` (translation) and `turn` (rotation)."""

    speed: float = 0.9
    turn: float = 0.4
    gain: float = 1.5


@dataclass(frozen=True)
class Tolerance:
    """When a pose counts as reached: metres and radians."""

    position: float = 0.006
    angle: float = 0.06


def turned(yaw: float, base: np.ndarray = DOWN) -> np.ndarray:
    """Return `base` (3, 3) turned by `yaw` radians about the world's vertical."""
    return Rotation.from_rotvec([0.0, 0.0, yaw]).as_matrix() @ base


def leaning(into: np.ndarray, tilt: float, *, across: bool) -> np.ndarray:
    """Return a hand rotation (3, 3) whose fingers point down, leaning by `tilt` radians towards `into`.

    The fingers close `across` the horizontal unit vector `into`, or else in the plane of lean.
    """
    side = np.cross(into, UP)
    closing = side if across else into
    yaw = np.arctan2(-closing[0], closing[1])
    yaw = (yaw + MOST_BACK_TURN) % np.pi - MOST_BACK_TURN  # half a turn looks the same
    return Rotation.from_rotvec(tilt * side).as_matrix() @ turned(yaw)


def reach_tilt(base: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Return the rotation (3, 3) that leans a vertical hand so that it can work at `position`.

    Pointing straight down, the arm is fully stretched 0.75 m from its base and the controller gets stuck
    there. Leaning the fingers outwards brings the wrist back in.
    """
    outward = position[:2] - base[:2]
    away = float(np.linalg.norm(outward))
    angle = np.clip(LEAN * (away - EASY_REACH), 0.0, 0.5)
    axis = np.array([outward[1], -outward[0], 0.0]) / max(away, 1e-9)
    return Rotation.from_rotvec(axis * angle).as_matrix()


def rotation_error(target: np.ndarray, current: np.ndarray) -> np.ndarray:
    """Return the world-frame rotation vector (3,) that turns `current` into `target`, shortest way."""
    return Rotation.from_matrix(target @ current.T).as_rotvec()


def bounded(vector: np.ndarray, limit: float) -> np.ndarray:
    """Scale a vector down, keeping its direction, until no entry exceeds `limit`."""
    largest = np.abs(vector).max(initial=0.0)
    return vector * (limit / largest) if largest > limit else vector


def servo(current: Pose, target: Pose, gripper: float, limits: Limits) -> np.ndarray:
    """Return the action (7,) in [-1, 1] that moves the hand from `current` towards `target`."""
    shift = limits.gain * (target.position - current.position) / TRANSLATION_UNIT
    turn = limits.gain * rotation_error(target.rotation, current.rotation) / ROTATION_UNIT
    return np.concatenate([bounded(shift, limits.speed), bounded(turn, limits.turn), [gripper]])


def distance(a: Pose, b: Pose) -> tuple[float, float]:
    """Return how far two poses are apart, metres and radians."""
    angle = np.linalg.norm(rotation_error(a.rotation, b.rotation))
    return float(np.linalg.norm(a.position - b.position)), float(angle)


def close_to(a: Pose, b: Pose, tolerance: Tolerance) -> bool:
    """Return whether two poses agree within `tolerance`."""
    apart, angle = distance(a, b)
    return apart < tolerance.position and angle < tolerance.angle


def funnel(current: Pose, target: Pose, approach: np.ndarray, height: float) -> Pose:
    """Return the pose to steer for so that `target` is entered along the unit vector `approach`.

    The hand is held back by up to `height` in proportion to how far it is off the approach line and how
    wrongly it is turned: far away it aims above the target, on the line it goes in. Memoryless, so a push
    off the line simply lifts the hand again. A hand that is much too low goes back before it goes sideways.
    """
    offset = current.position - target.position
    sideways = offset - approach * (offset @ approach)
    angle = np.linalg.norm(rotation_error(target.rotation, current.rotation))
    error = max(0.0, np.linalg.norm(sideways) - 0.008) + 0.12 * max(0.0, angle - 0.08)
    held_back = min(height, 3.0 * error)
    behind = np.clip((-(offset @ approach) - held_back + 0.08) / 0.05, 0.0, 1.0)
    return Pose(target.position - approach * held_back + (1.0 - behind) * sideways, target.rotation)


def reach(
    scene: Scene,
    target: Callable[[], Pose],
    gripper: float,
    limits: Limits,
    *,
    tolerance: Tolerance = Tolerance(),
    patience: int = 120,
    until: Callable[[], bool] = lambda: False,
) -> Actions:
    """Yield actions until the hand is at ``target()``, `until` holds or `patience` steps have passed."""
    for _ in range(patience):
        goal, hand = target(), scene.hand
        if until() or close_to(hand, goal, tolerance):
            return
        yield servo(hand, goal, gripper, limits)


def stay(scene: Scene, target: Callable[[], Pose], gripper: float, limits: Limits, steps: int) -> Actions:
    """Yield `steps` actions that keep the hand at ``target()`` (while the gripper opens or closes)."""
    for _ in range(steps):
        yield servo(scene.hand, target(), gripper, limits)

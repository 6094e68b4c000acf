"""Where to hold an object: an exhaustive search over parallel-jaw grasps on the collision surface.

A grasp is a hand pose relative to the object. Candidates are a grid over hand rotation, sideways offset,
depth and finger centring; a candidate is feasible when the open fingers and the palm are free all along
the approach and something lies between the pads; feasible grasps are ranked by `GraspCost`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .hand import (
    FINGER_HALF_WIDTH,
    FINGER_INNER,
    FINGER_TIP,
    PAD,
    PAD_HALF_WIDTH,
    PALM_FRONT,
    PALM_HALF,
    finger_thickness,
)
from .motion import EASY_REACH, reach_tilt, turned
from .scene import Cloud, Pose, Scene

CLEARANCES = (0.004, 0.002, 0.0)
"""Metres that the open hand keeps from everything it must not touch; the next is tried if nothing fits."""


MARGIN = 0.004
"""Metres of air between an open finger and the object's near side."""

STEEPEST = 0.75
"""Largest `GraspCost.slant` of a grasp: 1 minus the cosine between contact normal and closing axis."""

YAWS = np.radians(np.arange(-75, 91, 15))
"""Hand yaws to try, relative to the start yaw; the gripper looks the same after half a turn."""


@dataclass(frozen=True)
class Grasp:
    """`relative` is the hand pose in the object's frame; `width` the object's thickness there, metres."""

    relative: Pose
    width: float
    cost: float

    def hand(self, object_pose: Pose) -> Pose:
        """Return the hand pose in the world for the object where it is now."""
        return object_pose @ self.relative


@dataclass(frozen=True)
class GraspCost:
    """Weights of what makes a grasp bad; all terms are roughly in [0, 1]."""

    slant: float = 1.0  # contact normals that do not oppose the closing fingers
    shallow: float = 0.6  # part of the pads' height that holds nothing
    high: float = 0.1  # near the upper edge, where a small error misses
    lopsided: float = 0.5  # one finger touches first and shoves the object
    off_centre: float = 0.4  # far from the centroid, where gravity twists the object
    turn: float = 0.35  # hand yaw away from the start yaw
    far: float = 5.0  # metres beyond the easy reach of the arm, at the grasp and at the destination


COST = GraspCost()


class GraspError(RuntimeError):
    """No feasible grasp exists for an object where it is."""


def plan_grasps(
    scene: Scene,
    name: str,
    *,
    destination: np.ndarray | None = None,
    cost: GraspCost = COST,
) -> list[Grasp]:
    """Return the feasible grasps of the entity `name`, best first.

    The hand is vertical, or leans as far as the arm's reach demands. With `destination` (3,), where the
    object's origin will go, grasps that can be reached there too are preferred. Raises `GraspError` when
    nothing is feasible.
    """
    shape, pose = scene.cloud(name), scene.pose(name)
    lean = reach_tilt(scene.base, pose.position)
    turns = [(lean @ turned(yaw), cost.turn * abs(yaw) / np.pi * 2) for yaw in YAWS]
    found = search(shape, pose, scene.obstacles(name).points, turns, cost)
    if not found:
        raise GraspError(f"No hand pose can hold '{name}' without hitting something.")
    ranked = [_with_reach(scene, grasp, pose, destination, cost.far) for grasp in found]
    return sorted(ranked, key=lambda grasp: grasp.cost)


def search(
    shape: Cloud,
    frame: Pose,
    obstacles: np.ndarray,
    rotations: list[tuple[np.ndarray, float]],
    cost: GraspCost = COST,
) -> list[Grasp]:
    """Return the feasible grasps of `shape`, relative to `frame`, for each (hand rotation, its own cost).

    `obstacles` (n, 3) are samples of everything else that can be hit.
    """
    near = obstacles[np.linalg.norm(obstacles - shape.points.mean(0), axis=1) < 0.35]
    found: list[Grasp] = []
    for clearance in CLEARANCES:
        for rotation, extra in rotations:
            found += _with_rotation(shape, near, rotation, frame, cost, extra, clearance)
        if found:
            break
    return found


def _with_reach(
    scene: Scene, grasp: Grasp, pose: Pose, destination: np.ndarray | None, weight: float
) -> Grasp:
    """Return the grasp with the cost of stretching the arm for it, and for putting the object down."""
    hand = grasp.hand(pose).position
    places = [hand] if destination is None else [hand, hand + destination - pose.position]
    beyond = sum(max(0.0, np.linalg.norm((p - scene.base)[:2]) - EASY_REACH) for p in places)
    return replace(grasp, cost=grasp.cost + weight * beyond)


def choose(grasps: list[Grasp], spread: float, rng: np.random.Generator) -> Grasp:
    """Draw one of the grasps whose cost is within `spread` of the best (0: always the best)."""
    near_best = [grasp for grasp in grasps if grasp.cost <= grasps[0].cost + spread]
    return near_best[rng.integers(len(near_best))]


def _with_rotation(
    shape: Cloud,
    obstacles: np.ndarray,
    rotation: np.ndarray,
    object_pose: Pose,
    cost: GraspCost,
    extra: float,
    clearance: float,
) -> list[Grasp]:
    """Return the feasible grasps with one hand rotation; `extra` is that rotation's own cost."""
    body, normals, blocked = shape.points @ rotation, shape.normals @ rotation, obstacles @ rotation
    centroid = (body.min(0) + body.max(0)) / 2
    found = []
    for side in _grid(body[:, 1].min() + 0.004, body[:, 1].max() - 0.004, 0.006, centroid[1]):
        column = np.abs(body[:, 1] - side) < PAD_HALF_WIDTH
        palm = _columns(body, blocked, side, PALM_HALF[1])
        fingers = _columns(body, blocked, side, FINGER_HALF_WIDTH + clearance / 2)
        if not column.any():
            continue
        top = body[column, 2].min()  # z points down: the smallest is the highest
        for depth in _depths(top, body[column, 2].max()):
            for centre, width, terms in _centred(
                body[column], normals[column], fingers, palm, depth, clearance
            ):
                grasp = np.array([centre, side, depth])
                away = np.linalg.norm((grasp - centroid)[:2]) / 0.1
                high = max(0.0, 0.02 - (depth - top)) / 0.02
                total = (
                    extra
                    + cost.high * high
                    + cost.slant * terms[0]
                    + cost.shallow * terms[1]
                    + cost.lopsided * terms[2]
                )
                hand = Pose(rotation @ grasp, rotation)
                found.append(Grasp(object_pose.inverse() @ hand, width, total + cost.off_centre * away))
    return found


def _depths(top: float, bottom: float) -> np.ndarray:
    """Return the depths of the grip site to try: the first holds only the upper edge (the rim of a plate)."""
    return np.append(top - 0.001, np.arange(top + 0.004, min(bottom, top + 0.06) + 0.006, 0.006))


def _columns(body: np.ndarray, blocked: np.ndarray, side: float, half: float) -> np.ndarray:
    """Return the (x, z) of every sample whose sideways coordinate is within `half` of the hand's."""
    points = np.concatenate([body, blocked])
    return points[np.abs(points[:, 1] - side) < half][:, [0, 2]]


def _grid(low: float, high: float, step: float, through: float) -> np.ndarray:
    """Return values `step` apart in [low, high], one of which is `through` (alone if the range is empty)."""
    if high <= low:
        return np.array([through])
    below, above = np.floor((through - low) / step), np.floor((high - through) / step)
    return through + step * np.arange(-max(0.0, below), max(0.0, above) + 1)


def _centred(
    column: np.ndarray,
    normals: np.ndarray,
    fingers: np.ndarray,
    palm: np.ndarray,
    depth: float,
    clearance: float,
) -> list[tuple[float, float, tuple[float, float, float]]]:
    """Return (finger centre, width, (slant, shallow, lopsided)) of the free placements at one depth."""
    band = (column[:, 2] > depth + PAD[0]) & (column[:, 2] < depth + PAD[1])
    if not band.any():
        return []
    x, z, along = column[band, 0], column[band, 2], normals[band, 0]
    found = []
    in_way = fingers[fingers[:, 1] < depth + FINGER_TIP + clearance]
    in_way = np.stack([in_way[:, 0], FINGER_INNER + finger_thickness(in_way[:, 1] - depth)])
    over = palm[palm[:, 1] < depth + PALM_FRONT + clearance, 0]
    for middle in np.arange(x.min() - 0.03, x.max() + 0.03, 0.004):
        inside = np.abs(x - middle) < FINGER_INNER
        if not inside.any():
            continue
        low, high = x[inside].min(), x[inside].max()
        # Slide the hand so that both fingers are equally far, unless something else then is in the way.
        for centre in dict.fromkeys(((low + high) / 2, middle)):
            if high - low > 2 * FINGER_INNER - 2 * MARGIN or _hits(in_way, over, centre, clearance):
                continue
            if max(high - centre, centre - low) > FINGER_INNER - MARGIN:
                continue
            right, left = inside & (x > high - 0.003), inside & (x < low + 0.003)
            slant = 1.0 - min(along[right].max(), (-along[left]).max())
            covered = min(np.ptp(z[right]), np.ptp(z[left])) / (PAD[1] - PAD[0])
            lopsided = abs(centre - (low + high) / 2) / 0.02
            if slant < STEEPEST:
                found.append((centre, high - low, (slant, 1.0 - covered, lopsided)))
            break
    return list(dict.fromkeys(found))


def _hits(in_way: np.ndarray, over: np.ndarray, centre: float, clearance: float) -> bool:
    """Return whether the open fingers or the palm, centred there, meet a sample on their way in."""
    away = np.abs(in_way[0] - centre)
    if np.any((away > FINGER_INNER - 0.5 * clearance) & (away < in_way[1] + clearance)):
        return True
    return bool(np.any(np.abs(over - centre) < PALM_HALF[0] + clearance))

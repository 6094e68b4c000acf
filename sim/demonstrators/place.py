"""Put a held object down on an entity, on a region or in a container."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from .grasp import Grasp
from .hand import hand_meets
from .motion import CLOSE, OPEN, Actions, Limits, Tolerance, reach, reach_tilt, servo, stay
from .pick import Hold
from .scene import Pose, Scene, corridor
from .style import Manner

EDGE = {"in": 0.03, "on": 0.015}
"""Metres that an object's origin keeps from the edge of a region."""

CELL = 0.006
"""Resolution of height maps, metres."""

LOOK_CLOSER = 8
"""Of all spots, how many of the best are checked for the room that the hand needs."""


@dataclass(frozen=True)
class Drop:
    """Where the object's origin (3,) is released, at what height it will `rest`, how the hand is turned."""

    origin: np.ndarray
    rest: float
    facing: np.ndarray


class HeightMap:
    """Highest obstacle over a square patch of ground, from surface samples (n, 3)."""

    def __init__(self, points: np.ndarray, centre: np.ndarray, half: float) -> None:
        self._corner = centre[:2] - half
        self._size = int(np.ceil(2 * half / CELL)) + 1
        self._top = np.full((self._size, self._size), -np.inf)
        cells = self._cells(points)
        inside = np.all((cells >= 0) & (cells < self._size), axis=1)
        np.maximum.at(self._top, tuple(cells[inside].T), points[inside, 2])

    def _cells(self, points: np.ndarray) -> np.ndarray:
        return np.floor((points[:, :2] - self._corner) / CELL).astype(int)

    def rest(self, shape: np.ndarray, shift: np.ndarray) -> float:
        """Return how high a shape (n, 3), moved by `shift` (2,), sinks: the z shift at first contact.

        The shape is taken a little narrower than it is, since cells make everything else wider.
        """
        middle = (shape[:, :2].min(0) + shape[:, :2].max(0)) / 2
        cells = self._cells(middle + 0.85 * (shape[:, :2] - middle) + shift).clip(0, self._size - 1)
        return float(np.max(self._top[tuple(cells.T)] - shape[:, 2]))


def lower_side(points: np.ndarray) -> np.ndarray:
    """Return the lowest point over every cell of the ground: what decides how a shape comes to rest."""
    upwards = points[np.argsort(points[:, 2])]
    _, first = np.unique(np.floor(upwards[:, :2] / CELL), axis=0, return_index=True)
    return upwards[first]


def plan_drop(
    scene: Scene, name: str, predicate: str, target: str, manner: Manner, hand: Pose, opening: float
) -> Drop:
    """Return where to release the entity `name` so that ``predicate(name, target)`` becomes true.

    `hand` is how it is held, or would be held where it is now; `opening` is half the finger distance.
    """
    obstacles = scene.obstacles(name).points
    origin = scene.pose(name).position
    centre, half = destination(scene, predicate, target)
    ground = HeightMap(obstacles, centre, 0.25)
    goal = hand.position + centre - origin
    lean = reach_tilt(scene.base, goal) @ reach_tilt(scene.base, hand.position).T
    held = Pose(origin - lean @ origin, lean)  # turns everything in the hand about the object's origin
    shape, turned_hand = lower_side(held.apply(scene.cloud(name).points)), held @ hand
    local = obstacles[np.linalg.norm(obstacles[:, :2] - centre[:2], axis=1) < 0.2]
    away = (centre - scene.base)[:2] / np.linalg.norm((centre - scene.base)[:2])
    crowded = _crowded(scene, name, predicate, target)
    spots = []
    for offset in _offsets(half):
        shift = centre[:2] + offset + manner.waypoint_offset - origin[:2]
        rise = ground.rest(shape, shift)
        spots.append((2.0 * rise + (-offset @ away if crowded else np.linalg.norm(offset)), rise, shift))
    drops = []
    for cost, rise, shift in sorted(spots, key=lambda spot: spot[0])[:LOOK_CLOSER]:
        free = _free_height(turned_hand, opening, local, shift, rise)
        drop = Drop(origin + np.append(shift, free), rise + origin[2], turned_hand.rotation)
        drops.append((cost + 0.5 * (free - rise), drop))
    return min(drops, key=lambda pair: pair[0])[1]


def low_release(
    scene: Scene, name: str, target: str, grasps: list[Grasp], manner: Manner, most: int = 10
) -> list[Grasp]:
    """Rank grasps anew for a narrow container: what counts most is how deep the hand fits in with them."""
    pose = scene.pose(name)
    ranked = []
    for grasp in _varied(grasps, most):
        drop = plan_drop(scene, name, "in", target, manner, grasp.hand(pose), grasp.width / 2)
        ranked.append(replace(grasp, cost=grasp.cost + 8.0 * (drop.origin[2] - drop.rest)))
    return sorted(ranked, key=lambda grasp: grasp.cost)


def _varied(grasps: list[Grasp], most: int) -> list[Grasp]:
    """Return the best grasps of every hand rotation in turn, `most` at the most."""
    by_turn: dict[tuple, list[Grasp]] = {}
    for grasp in grasps:
        by_turn.setdefault(tuple(grasp.relative.rotation.ravel().round(3)), []).append(grasp)
    return [g for round_ in itertools.zip_longest(*by_turn.values()) for g in round_ if g is not None][:most]


def _crowded(scene: Scene, name: str, predicate: str, target: str) -> bool:
    """Return whether more has to go on the same place, so that this entity belongs at its far edge."""
    others = [p for p in scene.goal if p[0] == predicate == "on" and p[2] == target and p[1] != name]
    return any(not scene.holds(p) for p in others)


def destination(scene: Scene, predicate: str, target: str) -> tuple[np.ndarray, np.ndarray]:
    """Return where the object's origin belongs: centre (3,) and the free half size (2,) around it."""
    if not scene.is_region(target):
        return scene.pose(target).position, np.zeros(2)
    region = scene.region(target)
    extent = region.extent() if predicate == "in" else region.half
    return region.pose.position, np.maximum(0.0, extent[:2] - EDGE[predicate])


def _offsets(half: np.ndarray, step: float = 0.005) -> np.ndarray:
    """Return a grid (n, 2) of offsets within a rectangle, nearest to its centre first."""
    axes = [step * np.arange(-np.floor(h / step), np.floor(h / step) + 1) for h in half]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    return grid[np.argsort(np.linalg.norm(grid, axis=1), kind="stable")]


def _free_height(hand: Pose, opening: float, obstacles: np.ndarray, shift: np.ndarray, rise: float) -> float:
    """Return the lowest z shift, at least `rise` plus a little air, at which the hand fits."""
    for height in np.arange(rise + 0.006, rise + 0.3, 0.01):
        moved = Pose(hand.position + np.append(shift, height), hand.rotation)
        if not hand_meets(obstacles, moved, opening):
            return float(height)
    return rise + 0.3


def ceiling(scene: Scene, name: str, goal: np.ndarray) -> float:
    """Return the height of what stands highest on the entity's straight way to `goal`, -inf for nothing."""
    obstacles, shape = scene.obstacles(name).points, scene.cloud(name).points
    start = scene.pose(name).position
    radius = np.linalg.norm(shape[:, :2] - start[:2], axis=1).max() + 0.02
    _, aside = corridor(obstacles, start, goal)
    return float(obstacles[aside < radius, 2].max(initial=-np.inf))


def carry_action(scene: Scene, name: str, drop: Drop, floor: float, limits: Limits) -> np.ndarray:
    """Return the action that brings the held entity's origin towards the drop, no part of it below `floor`.

    Rises first, travels once nearly high enough, and comes down in a steep cone around the drop point. How
    low the entity hangs is looked at anew every time: it may slip or swing in the hand.
    """
    hand, origin = scene.hand, scene.pose(name).position
    height = floor + hand.position[2] - scene.cloud(name).points[:, 2].min()
    error = drop.origin - origin
    away = float(np.linalg.norm(error[:2]))
    low = hand.position[2] + error[2]
    goal_z = low + min(max(height - low, 0.0), 5.0 * max(0.0, away - 0.012))
    risen = np.clip((hand.position[2] - goal_z + 0.05) / 0.03, 0.0, 1.0)
    goal = np.array([*(hand.position[:2] + risen * error[:2]), goal_z])
    return servo(hand, Pose(goal, drop.facing), CLOSE, limits)


def place(scene: Scene, name: str, predicate: str, target: str, manner: Manner) -> Actions:
    """Carry the held entity to where ``predicate(name, target)`` holds, release it and draw back.

    Ends early when the object is lost.
    """
    drop = plan_drop(scene, name, predicate, target, manner, scene.hand, scene.gripper_width / 2)
    floor = ceiling(scene, name, drop.origin) + manner.carry_clearance
    hold = Hold(scene, name)
    for _ in range(160):
        if hold.lost():
            return
        error = drop.origin - scene.pose(name).position
        if np.linalg.norm(error[:2]) < 0.012 and abs(error[2]) < 0.008:
            break
        yield carry_action(scene, name, drop, floor, manner.limits)
    yield from release(scene, manner)


def release(scene: Scene, manner: Manner, back: float = 0.08) -> Actions:
    """Open the gripper and draw the hand back along its own axis."""
    here = scene.hand
    yield from stay(scene, lambda: here, OPEN, manner.limits, 5)
    yield from withdraw(scene, manner, back)


def withdraw(scene: Scene, manner: Manner, back: float = 0.08) -> Actions:
    """Draw the open hand back along its own axis."""
    here = scene.hand
    away = Pose(here.position - back * here.rotation[:, 2], here.rotation)
    yield from reach(scene, lambda: away, OPEN, manner.limits, tolerance=Tolerance(0.02, 0.3), patience=20)

"""Put an object into a compartment that has a roof, through its open front."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from .grasp import Grasp, GraspError, choose, search
from .hand import FINGER_INNER, hand_meets
from .motion import CLOSE, OPEN, UP, Actions, Limits, Tolerance, funnel, leaning, reach, servo, stay
from .pick import Hold, take
from .place import Drop, carry_action, ceiling
from .scene import Pose, Region, Scene
from .style import Manner

TILTS = np.radians([40, 50, 60, 70, 80, 90])
"""How far the hand leans into the compartment."""

TURNS = np.radians([0, 15, -15, 30, -30])
"""Turns of the leaning hand about the vertical, in the order in which they are tried."""

AIR = 0.006
"""Metres between a carried object and the compartment's floor."""


def opening(scene: Scene, region: Region) -> np.ndarray | None:
    """Return the horizontal unit vector that points out of a roofed region; None if it is open above.

    Doors and drawers do not count as walls.
    """
    if region.parent is None:
        return None
    moving = {joint.body for joint in scene.joints(region.parent)}
    walls = scene.cloud_of([body for body in scene.bodies(region.parent) if body not in moving]).points
    local, half = walls - region.pose.position, region.extent()
    above = local[(local[:, 2] > 0) & np.all(np.abs(local[:, :2]) < half[:2] / 2, axis=1)]
    if len(np.unique(np.round(above[:, :2] / (half[:2] / 4)), axis=0)) < 12:  # of 25 cells
        return None
    ways = [np.array(way, float) for way in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0))]
    return min(ways, key=lambda way: _in_the_way(local, half, way))


def _in_the_way(local: np.ndarray, half: np.ndarray, way: np.ndarray) -> int:
    """Count wall samples in the corridor that leads from a region's centre along `way`."""
    side = np.abs(np.cross(UP, way))
    corridor = (local @ way > 0) & (np.abs(local @ side) < 0.5 * (half @ side))
    return int(np.sum(corridor & (np.abs(local[:, 2]) < 0.5 * half[2])))


def insert(
    scene: Scene,
    name: str,
    target: str,
    out: np.ndarray,
    manner: Manner,
    rng: np.random.Generator,
) -> Actions:
    """Grasp the entity `name` with a hand that leans in, carry it in front of the region and push it in.

    `out` is the region's `opening`. Ends early when the object is lost; raises `GraspError` when no grasp
    fits both where the object is and where it goes.
    """
    region = scene.region(target)
    goal = inner_goal(scene, name, region, out)
    grasp = choose(plan_leaning(scene, name, goal, out), manner.grasp_spread, rng)
    if not (yield from take(scene, name, grasp, manner)):
        return
    before = goal + out * _way_in(scene, name, goal, region, out)
    drop = Drop(before, before[2], scene.hand.rotation)
    floor = ceiling(scene, name, before) + manner.carry_clearance
    yield from _while_held(scene, name, drop, floor, manner)
    yield from _slide_in(scene, name, goal, out, drop, manner)
    here = scene.hand
    yield from stay(scene, lambda: here, OPEN, manner.limits, 6)
    away = Pose(here.position + 0.14 * out + 0.01 * UP, here.rotation)
    yield from reach(scene, lambda: away, OPEN, manner.limits, tolerance=Tolerance(0.03, 0.3), patience=30)


def _while_held(scene: Scene, name: str, drop: Drop, floor: float, manner: Manner) -> Actions:
    hold = Hold(scene, name)
    for _ in range(160):
        apart = np.linalg.norm(scene.pose(name).position - drop.origin)
        if apart < 0.012 or hold.lost():
            return
        yield carry_action(scene, name, drop, floor, manner.limits)


def _slide_in(
    scene: Scene, name: str, goal: np.ndarray, out: np.ndarray, drop: Drop, manner: Manner
) -> Actions:
    """Move the held entity's origin to `goal` along the line that leads in; give up when stuck."""
    limits = Limits(speed=0.6 * manner.limits.speed)
    nearest, since = np.inf, 0
    hold = Hold(scene, name)
    for _ in range(90):
        hand, origin = scene.hand, scene.pose(name).position
        left = float(np.linalg.norm(goal - origin))
        nearest, since = (left, 0) if left < nearest - 0.002 else (nearest, since + 1)
        if left < 0.008 or since > 8 or hold.lost():
            return
        inside = Pose(hand.position + goal - origin, drop.facing)
        length = float((drop.origin - goal) @ out)
        yield servo(hand, funnel(hand, inside, -out, length), CLOSE, limits)


def inner_goal(scene: Scene, name: str, region: Region, out: np.ndarray) -> np.ndarray:
    """Return where the entity's origin (3,) should stand: behind the opening, far from the side walls."""
    shape = scene.cloud(name).points - scene.pose(name).position
    walls = scene.obstacles(name).points
    walls = walls[np.linalg.norm(walls - region.pose.position, axis=1) < 0.4]
    centre, half = region.pose.position, region.extent()
    under = np.all(np.abs((walls - centre)[:, :2]) < 0.25 * half[:2], axis=1) & (walls[:, 2] < centre[2])
    floor = walls[under, 2].max()
    depth = (half @ np.abs(out)) - (shape @ out).max()
    side = np.abs(np.cross(UP, out))
    height = floor - shape[:, 2].min() + AIR
    upright = walls[(walls[:, 2] > floor + 0.02) & ((walls - centre) @ out > -(half @ np.abs(out)))]
    near = cKDTree(upright)
    best, most = None, -np.inf
    for lateral in np.arange(-1, 1.01, 0.1) * 0.8 * (half @ side):
        goal = centre + depth * out + lateral * side
        goal[2] = height
        room = float(near.query(shape + goal)[0].min()) - 1e-3 * abs(lateral)
        if room > most:
            best, most = goal, room
    return best


def _way_in(scene: Scene, name: str, goal: np.ndarray, region: Region, out: np.ndarray) -> float:
    """Return how far along `out` from `goal` the held entity is wholly in front of the compartment."""
    shape = scene.cloud(name).points - scene.pose(name).position
    moving = {joint.body for joint in scene.joints(region.parent)}
    fixed = scene.cloud_of([body for body in scene.bodies(region.parent) if body not in moving]).points
    return float((fixed @ out).max() + 0.03 - (goal @ out + (shape @ out).min()))


def plan_leaning(scene: Scene, name: str, goal: np.ndarray, out: np.ndarray) -> list[Grasp]:
    """Return the grasps, best first, whose hand leans against `out` and is free at the goal as well.

    Of the `TURNS`, the first with any such grasp is taken. Raises `GraspError` when there is none.
    """
    shape, pose = scene.cloud(name), scene.pose(name)
    obstacles = scene.obstacles(name).points
    for turn in TURNS:
        straight = [leaning(-out, tilt, across=True) for tilt in TILTS]
        rotations = [(Rotation.from_rotvec(turn * UP).as_matrix() @ facing, 0.0) for facing in straight]
        found = sorted(search(shape, pose, obstacles, rotations), key=lambda grasp: grasp.cost)
        fits = [grasp for grasp in found if _fits(grasp, pose, goal, obstacles)]
        if fits:
            return fits
    raise GraspError(f"No hand pose can carry '{name}' through the opening.")


def _fits(grasp: Grasp, pose: Pose, goal: np.ndarray, obstacles: np.ndarray) -> bool:
    """Return whether the hand is free when the entity, now at `pose`, has its origin at `goal`."""
    hand = grasp.hand(pose)
    inside = Pose(hand.position + goal - pose.position, hand.rotation)
    return not hand_meets(obstacles, inside, min(FINGER_INNER, grasp.width / 2 + 0.01), 0.0)

"""From a BDDL goal to an ordered list of skills."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .door import close_door
from .drawer import close_drawer, open_drawer
from .grasp import GraspError, choose, plan_grasps
from .insert import insert, opening
from .knob import turn_knob
from .motion import Actions
from .pick import take
from .place import destination, low_release, place, withdraw
from .push import is_dish, push
from .scene import Scene
from .style import Manner


def bring(scene: Scene, predicate: tuple[str, ...], manner: Manner, rng: np.random.Generator) -> Actions:
    """Pick the first argument of ``in`` or ``on`` and place it at the second."""
    relation, name, target = predicate
    if scene.is_drawer(target) and not _ajar(scene, target):
        yield from open_drawer(scene, target, manner, rng)
    inside = relation == "in" and scene.is_region(target)
    out = opening(scene, scene.region(target)) if inside else None
    if out is not None:
        yield from insert(scene, name, target, out, manner, rng)
        return
    goal, _ = destination(scene, relation, target)
    if scene.on_surface(target) and is_dish(scene, name):
        yield from push(scene, name, predicate, goal, manner)
        yield from withdraw(scene, manner)
        return
    grasps = plan_grasps(scene, name, destination=goal)
    if scene.is_drawer(target):
        grasps = low_release(scene, name, target, grasps, manner)
    grasp = choose(grasps, manner.grasp_spread, rng)
    if (yield from take(scene, name, grasp, manner)):
        yield from place(scene, name, relation, target, manner)


def _ajar(scene: Scene, drawer: str) -> bool:
    """Return whether a drawer is far enough open to put something in, though perhaps not fully."""
    return abs(scene.joints(drawer)[0].value) > 0.6 * abs(scene.wanted_value(drawer, "open"))


def _open(scene: Scene, predicate: tuple[str, ...], manner: Manner, rng: np.random.Generator) -> Actions:
    yield from open_drawer(scene, predicate[1], manner, rng)


def _close(scene: Scene, predicate: tuple[str, ...], manner: Manner, rng: np.random.Generator) -> Actions:
    _, name = predicate
    if scene.joints(name)[0].slides:
        yield from close_drawer(scene, name, manner)
    else:
        yield from close_door(scene, name, manner)


SKILLS = {
    "in": bring,
    "on": bring,
    "turnon": turn_knob,
    "turnoff": turn_knob,
    "open": _open,
    "close": _close,
}
"""Which skill makes a predicate true."""

ORDER = ("turnon", "turnoff", "open", "on", "in", "close")
"""Predicates are made true in this order: containers are filled before they are closed."""

PATIENCE = 5
"""How often a demonstrator draws back and looks again when it finds no grasp: things may still be moving."""

RETRY_SPREAD = 0.1
"""How much more a grasp may cost at every new try, so that what has failed is not repeated for ever."""


def _bolder(manner: Manner, tries: int) -> Manner:
    return replace(manner, grasp_spread=manner.grasp_spread + RETRY_SPREAD * tries)


def fulfil(scene: Scene, manner: Manner, rng: np.random.Generator) -> Actions:
    """Make the predicates of the goal true one after the other, again and again until all hold.

    Raises `GraspError` when something cannot be held, also on second thoughts.
    """
    ordered = sorted(scene.goal, key=lambda predicate: ORDER.index(predicate[0]))
    tries = dict.fromkeys(ordered, 0)
    refusals = 0
    while True:
        for predicate in ordered:
            if scene.holds(predicate):
                continue
            try:
                yield from SKILLS[predicate[0]](scene, predicate, _bolder(manner, tries[predicate]), rng)
                tries[predicate] += 1
            except GraspError:
                refusals += 1
                if refusals > PATIENCE:
                    raise
                yield from withdraw(scene, manner)

"""From a BDDL goal to an ordered list of skills."""

from __future__ import annotations

import numpy as np

from .drawer import close_drawer, open_drawer
from .knob import turn_knob
from .motion import Actions
from .pick import holding, pick
from .place import destination, place
from .scene import Scene
from .style import Manner


def bring(scene: Scene, predicate: tuple[str, ...], manner: Manner, rng: np.random.Generator) -> Actions:
    """Pick the first argument of ``in`` or ``on`` and place it at the second."""
    relation, name, target = predicate
    if relation == "in" and scene.joints(target) and not scene.holds(("open", target)):
        yield from open_drawer(scene, target, manner, rng)
    yield from pick(scene, name, manner, rng, destination(scene, relation, target)[0])
    if holding(scene, name):
        yield from place(scene, name, relation, target, manner)


def _open(scene: Scene, predicate: tuple[str, ...], manner: Manner, rng: np.random.Generator) -> Actions:
    yield from open_drawer(scene, predicate[1], manner, rng)


def _close(scene: Scene, predicate: tuple[str, ...], manner: Manner, rng: np.random.Generator) -> Actions:
    yield from close_drawer(scene, predicate[1], manner, rng)


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


def fulfil(scene: Scene, manner: Manner, rng: np.random.Generator) -> Actions:
    """Make the predicates of the goal true one after the other, again and again until all hold."""
    ordered = sorted(scene.goal, key=lambda predicate: ORDER.index(predicate[0]))
    while True:
        for predicate in ordered:
            if not scene.holds(predicate):
                yield from SKILLS[predicate[0]](scene, predicate, manner, rng)

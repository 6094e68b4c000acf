"""From a BDDL goal to an ordered list of skills."""

from __future__ import annotations

import numpy as np

from .motion import Actions
from .pick import holding, pick
from .place import destination, place
from .scene import Scene
from .style import Manner


def bring(scene: Scene, predicate: tuple[str, ...], manner: Manner, rng: np.random.Generator) -> Actions:
    """Pick the first argument of ``in`` or ``on`` and place it at the second."""
    relation, name, target = predicate
    yield from pick(scene, name, manner, rng, destination(scene, relation, target)[0])
    if holding(scene, name):
        yield from place(scene, name, relation, target, manner)


SKILLS = {"in": bring, "on": bring}
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

"""Turn a knob: grip its blade from above and follow its joint."""

from __future__ import annotations

import numpy as np

from .grasp import YAWS, GraspError, search
from .joint import work
from .motion import Actions, turned
from .scene import Scene
from .style import Manner


def turn_knob(scene: Scene, predicate: tuple[str, ...], manner: Manner, rng: np.random.Generator) -> Actions:
    """Turn the knob of ``(state, name)`` until the state (``turnon``, ``turnoff``) holds.

    Raises `GraspError` when the knob cannot be gripped.
    """
    state, name = predicate
    joint = scene.joints(name)[0]
    knob, frame = scene.cloud_of([joint.body]), scene.body_pose(joint.body)
    fixed = scene.obstacles(name).points
    rest = scene.cloud_of([body for body in scene.bodies(name) if body != joint.body]).points
    turns = [(turned(yaw), 0.35 * abs(yaw)) for yaw in YAWS]
    found = search(knob, frame, np.concatenate([fixed, rest]), turns)
    if not found:
        raise GraspError(f"No hand pose can hold the knob of '{name}'.")
    yield from work(scene, name, found, lambda: scene.wanted_value(name, state), manner, rng)

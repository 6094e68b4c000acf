"""Turn a knob: grip its blade from above and follow its joint."""

from __future__ import annotations

import numpy as np

from .grasp import YAWS, GraspError, choose, search
from .joint import drag
from .motion import OPEN, Actions, Tolerance, funnel, reach, turned
from .pick import close_gripper, open_gripper
from .place import release
from .scene import Pose, Scene
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
    grasp = choose(sorted(found, key=lambda g: g.cost), manner.grasp_spread, rng)

    def entry() -> Pose:
        target = grasp.hand(scene.body_pose(joint.body))
        return funnel(scene.hand, target, target.rotation[:, 2], manner.approach_height)

    yield from open_gripper(scene, manner)
    yield from reach(scene, entry, OPEN, manner.limits, tolerance=Tolerance(0.006, 0.1))
    yield from close_gripper(scene, scene.hand, manner)
    yield from drag(scene, name, scene.wanted_value(name, state), manner)
    yield from release(scene, manner)

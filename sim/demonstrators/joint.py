"""Work an articulation: hold what moves and follow the path that its joint allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from scipy.spatial.transform import Rotation

from .grasp import Grasp, choose
from .motion import CLOSE, OPEN, Actions, Tolerance, funnel, reach, servo
from .pick import close_gripper, open_gripper
from .place import release
from .scene import Joint, Pose, Scene
from .style import Manner

LEAD = {True: 0.05, False: 0.35}
"""How far ahead of the joint the hand is sent, metres for sliding and radians for turning joints."""


def moved(joint: Joint, pose: Pose, change: float) -> Pose:
    """Return where `pose`, fixed to the joint's body, goes when the joint's value changes by `change`."""
    if joint.slides:
        return Pose(pose.position + change * joint.axis, pose.rotation)
    turn = Rotation.from_rotvec(change * joint.axis).as_matrix()
    return Pose(joint.anchor + turn @ (pose.position - joint.anchor), turn @ pose.rotation)


def drag(scene: Scene, name: str, value: float, manner: Manner, patience: int = 120) -> Actions:
    """Move the joint of `name` to `value` with the hand that has just closed on it.

    The hand steers for where it would be if the joint were a little further; ends at the value or when
    the hand has slipped off.
    """
    grip = replace(scene.joints(name)[0])
    start = scene.hand
    for _ in range(patience):
        joint = scene.joints(name)[0]
        left = value - joint.value
        if left * (value - grip.value) <= 0:
            return
        expected = moved(grip, start, joint.value - grip.value)
        if np.linalg.norm(scene.hand.position - expected.position) > 0.04:
            return
        ahead = np.clip(left, -LEAD[joint.slides], LEAD[joint.slides])
        ahead = ahead + np.sign(left) * 0.2 * LEAD[joint.slides]
        target = moved(grip, start, joint.value - grip.value + ahead)
        yield servo(scene.hand, target, CLOSE, manner.limits)


def work(
    scene: Scene,
    name: str,
    grasps: Sequence[Grasp],
    value: Callable[[], float],
    manner: Manner,
    rng: np.random.Generator,
) -> Actions:
    """Grip what the joint of `name` moves by one of `grasps`, bring the joint to `value` and let go.

    `value` is asked once the hand has closed, since gripping may move the joint.
    """
    body = scene.joints(name)[0].body
    grasp = choose(sorted(grasps, key=lambda g: g.cost), manner.grasp_spread, rng)

    def entry() -> Pose:
        target = grasp.hand(scene.body_pose(body))
        return funnel(scene.hand, target, target.rotation[:, 2], manner.approach_height)

    yield from open_gripper(scene, manner)
    yield from reach(scene, entry, OPEN, manner.limits, tolerance=Tolerance(0.006, 0.1))
    yield from close_gripper(scene, scene.hand, manner)
    yield from drag(scene, name, value(), manner)
    yield from release(scene, manner)

"""The keyframe: where the hand will be when the gripper next opens or closes.

An auxiliary training target. Grasps and releases are the moments at which a manipulation succeeds or
fails, and the place of the next one is visible in the image long before the actions towards it differ.
"""

from __future__ import annotations

import numpy as np


def next_keyframe(
    position: np.ndarray, gripper: np.ndarray, episode_end: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the way to the next gripper event for every frame.

    `position` (n, 3) is the end-effector position in metres, `gripper` (n,) the commanded gripper (above
    zero: close), `episode_end` (n,) one past the last frame of each frame's episode. An event is a
    frame whose command differs in sign from the frame before it in the same episode. Returns `offset`
    (n, 3) float32, ``position[event] - position[now]`` for the first event at or after now, and `is_pad`
    (n,) bool, true (with a zero offset) when the episode has no event left.
    """
    frames = np.arange(len(gripper))
    closed = gripper > 0
    changed = np.r_[False, (closed[1:] != closed[:-1]) & (episode_end[1:] == episode_end[:-1])]
    events = np.r_[np.flatnonzero(changed), len(gripper)]
    event = events[np.searchsorted(events, frames)]
    is_pad = event >= episode_end
    event = np.where(is_pad, frames, event)
    return (position[event] - position).astype(np.float32), is_pad

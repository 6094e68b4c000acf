"""The keyframe: where the hand will be when the gripper next opens or closes.

An auxiliary training target. Grasps and releases are the moments at which a manipulation succeeds or
fails, and the place of the next one is visible in the image long before the actions towards it differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla.contract import JOINT_POSITION, OSC_POSE_DELTA, Interface

#: What a tenth of a metre of the hand is about, in the units that joints have.
_JOINT_UNITS = {"rad": 0.2, "deg": 10.0}
_GRIPPER = "gripper"


@dataclass(frozen=True)
class HandPlace:
    """The entries of the state that say where the hand is: the first `dim`; errors count in `unit`."""

    dim: int
    unit: float

    @classmethod
    def of(cls, interface: Interface) -> HandPlace | None:
        """Say where the hand is in `interface`: its position for OSC_POSE, for joint positions the joints.

        None where that is unknown: no state, or joints whose last entry is not called a gripper. Without
        units, as in datasets that other programs recorded, joints count as degrees.
        """
        state, action = interface.state, interface.action
        if state is None:
            return None
        if interface.action_space == OSC_POSE_DELTA:
            return cls(3, 0.1)
        same = interface.action_space == JOINT_POSITION and state.names == action.names
        if not (same and state.dim > 1 and _GRIPPER in state.names[-1]):
            return None
        return cls(state.dim - 1, _JOINT_UNITS.get((state.units or ("deg",))[0], 10.0))


def is_closed(gripper: np.ndarray, action_space: str | None) -> np.ndarray:
    """Return on which side of its middle the commanded gripper (n,) is, as bool (n,).

    The middle is 0 for OSC_POSE, else that of the recorded commands. True is closed for OSC_POSE; for a
    joint it may as well be open, which makes no difference to when it changes.
    """
    middle = 0.0 if action_space == OSC_POSE_DELTA else (gripper.min() + gripper.max()) / 2
    return gripper > middle


def next_keyframe(
    place: np.ndarray, closed: np.ndarray, episode_end: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the way to the next gripper event for every frame.

    `place` (n, F) says where the hand is (`HandPlace`), `closed` (n,) bool the side of the commanded gripper
    (`is_closed`), `episode_end` (n,) one past the last frame of each frame's episode. An event is a frame
    whose command is on another side than that of the frame before it in the same episode. Returns `offset`
    (n, F) float32, ``place[event] - place[now]`` for the first event at or after now, and `is_pad` (n,) bool,
    true (with a zero offset) when the episode has no event left.
    """
    frames = np.arange(len(closed))
    changed = np.r_[False, (closed[1:] != closed[:-1]) & (episode_end[1:] == episode_end[:-1])]
    events = np.r_[np.flatnonzero(changed), len(closed)]
    event = events[np.searchsorted(events, frames)]
    is_pad = event >= episode_end
    event = np.where(is_pad, frames, event)
    return (place[event] - place).astype(np.float32), is_pad

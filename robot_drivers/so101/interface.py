"""The SO101 as a policy sees it: LeRobot's joint names and units against the driver's.

A policy reads and commands ``<joint>.pos``: body joints in degrees from the middle of their calibrated range,
the gripper from 0 (closed) to 100 (open), as LeRobot's SO101 follower does. The driver speaks radians and
fractions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vla.contract import (
    ACTION_KEY,
    IMAGE_PREFIX,
    JOINT_POSITION,
    STATE_KEY,
    Camera,
    Interface,
    Vector,
)

from .calibration import GRIPPER, JOINTS

NAMES = tuple(f"{name}.pos" for name in JOINTS)
UNITS = tuple("percent" if name == GRIPPER else "deg" for name in JOINTS)
_PER_UNIT = np.array([100.0 if name == GRIPPER else 180.0 / np.pi for name in JOINTS])


def so101_interface(cameras: Mapping[str, tuple[int, int]], control_rate: float) -> Interface:
    """Return what an SO101 offers a policy: `cameras` by name with (height, width), `control_rate` in Hz."""
    return Interface(
        cameras=tuple(Camera(IMAGE_PREFIX + name, *size) for name, size in cameras.items()),
        state=Vector(STATE_KEY, NAMES, UNITS),
        action=Vector(ACTION_KEY, NAMES, UNITS),
        action_space=JOINT_POSITION,
        control_rate=control_rate,
    )


def to_policy(q: np.ndarray) -> np.ndarray:
    """Return driver positions `q` (6,) as the policy's state, (6,) float32."""
    return (np.asarray(q, float) * _PER_UNIT).astype(np.float32)


def from_policy(action: np.ndarray) -> dict[str, float]:
    """Return a policy's action (6,) as a setpoint for the supervisor: driver position by joint name.

    Raises `ValueError` for another number of entries; what is not finite is the safety filter's business.
    """
    action = np.asarray(action, float)
    if action.shape != (len(JOINTS),):
        raise ValueError(f"an SO101 takes {len(JOINTS)} joint positions, got {action.shape}")
    return dict(zip(JOINTS, (action / _PER_UNIT).tolist(), strict=True))

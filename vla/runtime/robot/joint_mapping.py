"""From a policy's vectors to an arm's joints and back: which entry is which joint, in which unit.

A driver speaks SI units and fractions; a policy speaks what its dataset spoke. Per joint both are related by
``q = offset + scale * value``:

    rad, m, fraction     value
    deg                  value π / 180
    percent              value / 100                     (LeRobot's gripper, 0 closed to 100 open)
    normalized           lower + (value + 100) / 200 · (upper - lower)   (LeRobot's -100 to 100)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vla.contract import ContractError, Vector
from vla.robot_drivers.driver import DriverInfo, Joint

SCALES = {
    "rad": {"rad": 1.0, "deg": math.pi / 180},
    "m": {"m": 1.0},
    "fraction": {"fraction": 1.0, "percent": 0.01},
}
"""By the unit that the driver speaks: the units it can be given in, and their scale."""

NORMALIZED = "normalized"

SYNONYMS = {"degree": "deg", "degrees": "deg", "radian": "rad", "radians": "rad", "%": "percent"}

CONVENTIONS = {
    "lerobot-degrees": {"revolute": "deg", "gripper": "percent"},
    "lerobot-normalized": {"revolute": NORMALIZED, "gripper": "percent"},
    "si": {},
}
"""What a dataset that does not name its units may mean, by the kind of joint.

A kind that is left out is in the driver's own unit.
"""


@dataclass(frozen=True)
class JointMapping:
    """One vector of a policy: entry `i` is joint `order[i]`, ``q = offset[i] + scale[i] * value[i]``."""

    order: tuple[int, ...]
    scale: np.ndarray
    offset: np.ndarray
    names: tuple[str, ...]

    @classmethod
    def make(cls, vector: Vector, info: DriverInfo, convention: str | None = None) -> JointMapping:
        """Map `vector` to the joints of `info`, each exactly once.

        `convention` (a key of `CONVENTIONS`) replaces the vector's own units. Raises `ContractError`.
        """
        names = [joint_name(name) for name in vector.names]
        if sorted(names) != sorted(info.joint_names):
            raise ContractError(
                f"'{vector.key}' has the entries {', '.join(vector.names)}, the arm the joints"
                f" {', '.join(info.joint_names)}: each joint is needed once."
            )
        joints = [info.joints[info.joint_names.index(name)] for name in names]
        units = _units(vector, joints, convention)
        pairs = [_affine(joint, unit) for joint, unit in zip(joints, units, strict=True)]
        scale, offset = np.array(pairs).T
        return cls(tuple(info.joint_names.index(name) for name in names), scale, offset, tuple(names))

    def to_setpoint(self, values: np.ndarray) -> dict[str, float]:
        """Return the joint positions that `values` (D,) of the policy mean, by name, in the arm's units."""
        q = self.offset + self.scale * np.asarray(values, float)
        return dict(zip(self.names, q.tolist(), strict=True))

    def from_joints(self, q: np.ndarray) -> np.ndarray:
        """Return the policy's vector (D,) float32 for the arm's joint positions `q` (J,)."""
        return ((np.asarray(q, float)[list(self.order)] - self.offset) / self.scale).astype(np.float32)


def joint_name(entry: str) -> str:
    """Return ``gripper`` for LeRobot's ``gripper.pos``."""
    return entry.removesuffix(".pos")


def _units(vector: Vector, joints: Sequence[Joint], convention: str | None) -> list[str]:
    if convention is not None:
        by_kind = CONVENTIONS[convention]
        return [by_kind.get(joint.kind, joint.unit) for joint in joints]
    if len(vector.units) != len(joints):
        raise ContractError(
            f"The checkpoint does not say in which units '{vector.key}' is: say how its dataset was recorded"
            f" with --joint-units {{{','.join(CONVENTIONS)}}}."
        )
    return [SYNONYMS.get(unit, unit) for unit in vector.units]


def _affine(joint: Joint, unit: str) -> tuple[float, float]:
    """Return scale and offset of `unit` for `joint`."""
    if unit == NORMALIZED:
        scale = (joint.upper - joint.lower) / 200
        return scale, joint.lower + 100 * scale
    known: Mapping[str, float] = SCALES[joint.unit]
    if unit not in known:
        raise ContractError(
            f"Joint '{joint.name}' moves in {joint.unit}, which '{unit}' cannot be turned into; known are"
            f" {', '.join((*known, NORMALIZED))}."
        )
    return known[unit], 0.0

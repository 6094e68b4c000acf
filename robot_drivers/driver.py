"""The interface of every arm: what it is (`DriverInfo`), what it senses (`State`), what it does.

All quantities are SI: radians, metres, seconds, newton metres; grippers are fractions, 0 closed and 1 open.
This module imports no torch and no robot library; it is the only one an adapter has to know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from vla.errors import UserError

from .faults import DriverFault

Unit = Literal["rad", "m", "fraction"]
Kind = Literal["revolute", "prismatic", "gripper", "base"]
PowerOff = Literal["falls", "brakes", "holds"]

JOINT_POSITION, JOINT_VELOCITY, EE_POSE = "joint_position", "joint_velocity", "ee_pose"


@dataclass(frozen=True)
class Joint:
    """One joint and what it may do.

    `lower` and `upper` are the calibrated limits in `unit`; `velocity` in unit/s, `acceleration` in
    unit/s² and `effort` in N·m (N if prismatic) bound what is commanded, not what the motor could do.
    Raises `UserError` for limits that bound nothing.
    """

    name: str
    lower: float
    upper: float
    velocity: float
    acceleration: float
    effort: float | None = None
    unit: Unit = "rad"
    kind: Kind = "revolute"

    def __post_init__(self):
        bounds = (self.lower, self.upper, self.velocity, self.acceleration)
        if not all(map(math.isfinite, bounds)) or self.lower >= self.upper:
            raise UserError(
                f"Joint '{self.name}' has limits {self.lower:g} to {self.upper:g}, velocity {self.velocity:g}"
                f" and acceleration {self.acceleration:g}: give finite numbers with lower < upper."
            )
        if self.velocity <= 0 or self.acceleration <= 0:
            raise UserError(
                f"Joint '{self.name}' has velocity {self.velocity:g} and acceleration {self.acceleration:g}:"
                " both must be positive."
            )


@dataclass(frozen=True)
class DriverInfo:
    """What is known of an arm before it is connected.

    `control_rate` is in Hz. `power_off` says what the arm does without torque, and so what a fault may do
    to it. `safety` names what the arm does by itself (``hw_watchdog, hw_limits, collision_stop, brakes``),
    `telemetry` what it senses beside position (``velocity, effort, temperature, voltage, faults``).
    `rest` (J,) is the pose in which it can be released without harm, None if the arm has none of its own.
    """

    name: str
    joints: tuple[Joint, ...]
    control_rate: float
    power_off: PowerOff
    modes: frozenset[str] = frozenset({JOINT_POSITION})
    safety: frozenset[str] = frozenset()
    telemetry: frozenset[str] = frozenset()
    rest: tuple[float, ...] | None = None

    def __post_init__(self):
        names = [joint.name for joint in self.joints]
        if not names or len(set(names)) != len(names):
            raise UserError(f"The joints of '{self.name}' need names that differ, got {names}.")
        if not (math.isfinite(self.control_rate) and self.control_rate > 0):
            raise UserError(
                f"'{self.name}' has control rate {self.control_rate:g} Hz: give a positive number."
            )
        if JOINT_POSITION not in self.modes:
            raise UserError(f"'{self.name}' cannot be commanded by joint positions, which every driver must.")

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Names in the order of every joint vector."""
        return tuple(joint.name for joint in self.joints)

    @property
    def lower(self) -> np.ndarray:
        """Lower limits, (J,)."""
        return np.array([joint.lower for joint in self.joints])

    @property
    def upper(self) -> np.ndarray:
        """Upper limits, (J,)."""
        return np.array([joint.upper for joint in self.joints])

    @property
    def velocity(self) -> np.ndarray:
        """Velocity bounds, (J,)."""
        return np.array([joint.velocity for joint in self.joints])

    @property
    def acceleration(self) -> np.ndarray:
        """Acceleration bounds, (J,)."""
        return np.array([joint.acceleration for joint in self.joints])


@dataclass(frozen=True)
class State:
    """One coherent sample of the whole arm, all vectors (J,) in the order of `DriverInfo.joints`.

    `time` is the monotonic clock (s) at which the sample was requested, `sequence` counts samples.
    `q` is measured, `q_commanded` is the last position sent (None before the first).
    `dq`, `tau`, `temperature` (°C) and `voltage` (V) are None if the arm does not sense them. `faults` are
    the joints' own complaints.
    """

    time: float
    sequence: int
    q: np.ndarray
    enabled: tuple[bool, ...]
    dq: np.ndarray | None = None
    tau: np.ndarray | None = None
    q_commanded: np.ndarray | None = None
    faults: tuple[DriverFault, ...] = ()
    temperature: np.ndarray | None = None
    voltage: np.ndarray | None = None

    def age(self, now: float) -> float:
        """Seconds since the sample was requested, by the monotonic clock `now`."""
        return now - self.time


class RobotDriver(Protocol):
    """An arm. Called from one thread only; every call is bounded in time.

    Nothing but `DriverFault` (and `UserError` for wrong configuration) leaves a driver.
    """

    info: DriverInfo

    def open(self) -> None:
        """Identify the arm and check its calibration. Must neither move it nor change its torque."""

    def enable(self) -> None:
        """Take hold where the arm is: goal := present, limits written, torque on. No motion."""

    def read(self) -> State:
        """Return a fresh sample. Raises `BusTimeout`, `BusCorrupt` or `Disconnected`."""

    def write(self, q: np.ndarray, dq: np.ndarray | None = None) -> None:
        """Command joint positions `q` (J,), with velocities `dq` (J,) if the arm takes them."""

    def hold(self) -> None:
        """Command the present position."""

    def disable(self) -> list[DriverFault]:
        """Release every joint on its own, whatever the others answer; return what failed. Never raises."""

    def clear_faults(self) -> None:
        """Ask the arm to forget its latched faults."""

    def close(self) -> None:
        """Give the link back. Idempotent, never raises, does not change torque."""

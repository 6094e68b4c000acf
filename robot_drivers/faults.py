"""What can go wrong with an arm, as types: nothing else may leave a driver.

Every fault is a `UserError`: its message says what happened, where, and what to do. Faults are raised
by `RobotDriver.read` and the like, or carried as values in `State.faults` when the sample itself is good.
"""

from __future__ import annotations

from collections.abc import Sequence

from vla.errors import UserError


class DriverFault(UserError):
    """Base of everything an arm can report."""


class Disconnected(DriverFault):
    """The link is gone: no port, the adapter vanished, or servos stayed silent for too long."""


class BusTimeout(DriverFault):
    """Some joints did not answer within the time bound. `joints` are their names, in bus order."""

    def __init__(self, joints: Sequence[str], message: str):
        super().__init__(message)
        self.joints = tuple(joints)


class BusCorrupt(DriverFault):
    """Bytes arrived, but no reply with the right sender, length and checksum."""

    def __init__(self, joints: Sequence[str], message: str):
        super().__init__(message)
        self.joints = tuple(joints)


class ServoFault(DriverFault):
    """A joint reports trouble. `conditions` are words such as ``"overload"`` or ``"overheating"``."""

    def __init__(self, joint: str, conditions: Sequence[str], advice: str = ""):
        super().__init__(f"Joint '{joint}' reports {' and '.join(conditions)}. {advice}".rstrip())
        self.joint, self.advice = joint, advice
        self.conditions = tuple(conditions)


class NotCalibrated(DriverFault):
    """The arm does not carry the calibration that its positions are to be read with."""


class LimitViolation(DriverFault):
    """A setpoint or a start position that no filtering can make safe: not finite, or of unknown joints."""

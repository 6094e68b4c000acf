"""Arms: the driver interface, the safety layer that every arm shares, and the drivers."""

from .driver import DriverInfo, Joint, RobotDriver, State
from .faults import (
    BusCorrupt,
    BusTimeout,
    Disconnected,
    DriverFault,
    LimitViolation,
    NotCalibrated,
    ServoFault,
)
from .safety_filter import Filtered, FilterState, SafetyFilter

__all__ = [
    "BusCorrupt",
    "BusTimeout",
    "Disconnected",
    "DriverFault",
    "DriverInfo",
    "FilterState",
    "Filtered",
    "Joint",
    "LimitViolation",
    "NotCalibrated",
    "RobotDriver",
    "SafetyFilter",
    "ServoFault",
    "State",
]

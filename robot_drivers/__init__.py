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
from .supervisor import Cycle, Mode, ModeError, Supervisor, SupervisorConfig

__all__ = [
    "BusCorrupt",
    "BusTimeout",
    "Cycle",
    "Disconnected",
    "DriverFault",
    "DriverInfo",
    "FilterState",
    "Filtered",
    "Joint",
    "LimitViolation",
    "Mode",
    "ModeError",
    "NotCalibrated",
    "RobotDriver",
    "SafetyFilter",
    "ServoFault",
    "State",
    "Supervisor",
    "SupervisorConfig",
]

"""Arms: the driver interface, the safety layer that every arm shares, and the drivers."""

from .arm import Arm, ArmConfig, ArmEnded, LoopTiming
from .driver import DriverInfo, Joint, RobotDriver, State
from .ending import Ending, leave
from .faults import (
    BusCorrupt,
    BusTimeout,
    Disconnected,
    DriverFault,
    LimitViolation,
    NotCalibrated,
    ServoFault,
)
from .recorder import Record, Recorder, read_record
from .safety_filter import Filtered, FilterState, SafetyFilter
from .supervisor import Cycle, Mode, ModeError, Supervisor, SupervisorConfig
from .workspace import Workspace

__all__ = [
    "Arm",
    "ArmConfig",
    "ArmEnded",
    "BusCorrupt",
    "BusTimeout",
    "Cycle",
    "Disconnected",
    "DriverFault",
    "DriverInfo",
    "Ending",
    "FilterState",
    "Filtered",
    "Joint",
    "LimitViolation",
    "LoopTiming",
    "Mode",
    "ModeError",
    "NotCalibrated",
    "Record",
    "Recorder",
    "RobotDriver",
    "SafetyFilter",
    "ServoFault",
    "State",
    "Supervisor",
    "SupervisorConfig",
    "Workspace",
    "leave",
    "read_record",
]

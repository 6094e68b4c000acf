"""Calibrating an SO101: where each joint's middle is, and how far it goes. LeRobot's procedure and file.

The middle becomes step 2047 of every servo (`homing_offset` = position there − 2047), the range is what the
joint was moved through by hand. `wrist_roll` turns fully, so its range is the whole turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..faults import BusCorrupt, BusTimeout, NotCalibrated
from . import registers as r
from .bus import FeetechBus, patient
from .calibration import JOINTS, Calibration, JointCalibration, check_calibration

MIDDLE = (r.STEPS_PER_TURN - 1) // 2
FULL_TURN = "wrist_roll"
LEAST_RANGE = 400
"""Steps (35°) that every joint of an SO101 can do; less, and it was not moved through its range."""

SETTINGS = {
    r.OPERATING_MODE: 0,  # position
    r.RETURN_DELAY_TIME: 0,
    r.P_COEFFICIENT: 16,  # half the factory's: the arm does not tremble
    r.I_COEFFICIENT: 0,
    r.D_COEFFICIENT: 32,
}
"""What LeRobot writes at every connect, written once here: flash wears."""


@contextlib.contextmanager
def unlocked(bus: FeetechBus, name: str) -> Iterator[None]:
    """Let the servo keep what is written inside the block."""
    patient(bus.write, name, r.LOCK, 0)
    try:
        yield
    finally:
        patient(bus.write, name, r.LOCK, 1)


def write_if_different(bus: FeetechBus, name: str, values: Mapping[r.Register, int]) -> None:
    """Write registers whose value is another one; the servo must be unlocked."""
    for register, value in values.items():
        if patient(bus.read, name, register) != value:
            patient(bus.write, name, register, value)


def require_limp(bus: FeetechBus) -> None:
    """Raise `NotCalibrated` if a joint has torque: it would leap when its positions change their meaning."""
    held = [name for name in bus.joints if patient(bus.read, name, r.TORQUE_ENABLE)]
    if held:
        raise NotCalibrated(
            f"{', '.join(held)} have torque, and would leap: lay the arm down with `vla robot rest` first."
        )


def centre(bus: FeetechBus) -> dict[str, int]:
    """Make the present position every joint's middle; return the homing offsets. The arm must be limp."""
    require_limp(bus)
    offsets = {}
    for name in bus.joints:
        with unlocked(bus, name):
            whole = {r.HOMING_OFFSET: 0, r.MIN_POSITION_LIMIT: 0, r.MAX_POSITION_LIMIT: r.STEPS_PER_TURN - 1}
            write_if_different(bus, name, whole | SETTINGS)
            position = patient(bus.read, name, r.PRESENT_POSITION)
            offsets[name] = min(position - MIDDLE, MIDDLE)  # 2048 does not fit the register
            patient(bus.write, name, r.HOMING_OFFSET, offsets[name])
    return offsets


@dataclass
class Sweep:
    """The ranges seen so far, in steps, by joint."""

    low: dict[str, int] = field(default_factory=dict)
    high: dict[str, int] = field(default_factory=dict)
    now: dict[str, int] = field(default_factory=dict)

    def look(self, bus: FeetechBus) -> None:
        """Take in where the joints are; a lost reply is no loss."""
        with contextlib.suppress(BusTimeout, BusCorrupt):
            for name, status in bus.status().items():
                self.now[name] = status.position
                self.low[name] = min(self.low.get(name, status.position), status.position)
                self.high[name] = max(self.high.get(name, status.position), status.position)

    @property
    def unmoved(self) -> list[str]:
        """Joints that were not moved through their range."""
        return [
            name
            for name in JOINTS
            if name != FULL_TURN and self.high.get(name, 0) - self.low.get(name, 0) < LEAST_RANGE
        ]


def finish(bus: FeetechBus, offsets: Mapping[str, int], sweep: Sweep) -> Calibration:
    """Return the calibration that was found. Raises `NotCalibrated` for one that cannot be."""
    if sweep.unmoved:
        raise NotCalibrated(
            f"{', '.join(sweep.unmoved)} were hardly moved: calibrate again, and move every joint from one"
            " stop to the other."
        )
    calibration = {}
    for name in JOINTS:
        low, high = sweep.low[name], sweep.high[name]
        if name == FULL_TURN:
            low, high = 0, r.STEPS_PER_TURN - 1
        elif not 0 <= low < high < r.STEPS_PER_TURN:
            raise NotCalibrated(
                f"'{name}' went past the end of its encoder: calibrate again, and begin with it nearer to the"
                " middle of its range."
            )
        calibration[name] = JointCalibration(bus.joints[name], 0, offsets[name], low, high)
    check_calibration(calibration, "The calibration")
    return calibration


def write_calibration(bus: FeetechBus, calibration: Calibration) -> None:
    """Write it into the servos' flash, which shifts what their positions mean; the arm must be limp."""
    require_limp(bus)
    for name in JOINTS:
        with unlocked(bus, name):
            write_if_different(bus, name, calibration[name].eeprom | SETTINGS)


def read_calibration(bus: FeetechBus) -> Calibration:
    """Return the calibration that the servos carry; gripper and joints count upwards, as LeRobot's files say.

    Raises `NotCalibrated` if they carry none: a servo of the factory moves over the whole turn.
    """
    calibration = {}
    for name in JOINTS:
        offset, low, high = (
            patient(bus.read, name, it)
            for it in (r.HOMING_OFFSET, r.MIN_POSITION_LIMIT, r.MAX_POSITION_LIMIT)
        )
        if name != FULL_TURN and (low, high) == (0, r.STEPS_PER_TURN - 1):
            raise NotCalibrated(
                f"Servo {bus.joints[name]} ('{name}') carries no calibration: calibrate the arm."
            )
        calibration[name] = JointCalibration(bus.joints[name], 0, offset, low, high)
    check_calibration(calibration, "What the servos carry")
    return calibration

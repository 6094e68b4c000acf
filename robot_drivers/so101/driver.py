"""The SO101 behind the interface of every arm.

The servos' own limits (``GOAL_VELOCITY``, ``ACCELERATION``, ``TORQUE_LIMIT``) are written at every `enable`,
a little above what the safety filter asks for: they bound the arm when the host is dead.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..driver import DriverInfo, Joint, State
from ..faults import BusCorrupt, BusTimeout, DriverFault, LimitViolation, NotCalibrated, ServoFault
from . import registers as r
from .bus import FeetechBus, ServoStatus, patient
from .calibrating import write_calibration
from .calibration import (
    GRIPPER,
    JOINTS,
    RADIANS_PER_STEP,
    JointCalibration,
    check_calibration,
    load_calibration,
    parse_calibration,
)

VELOCITY, ACCELERATION = 2.0, 12.0  # rad/s and rad/s² of the body joints, 1/s and 1/s² of the gripper
STALL_TORQUE = 2.94  # N·m at 12 V
HEADROOM = 1.2
"""The servos' own limits over the filter's, so that they never hinder a motion that the filter allows."""

REST = (0.5, 0.03, 0.97, 0.8, 0.5, 0.05)
"""The rest pose as fractions of the calibrated ranges: upper arm laid back, forearm folded onto it, hand
down, gripper nearly closed. There the arm lies on its own stops, and stays without torque."""

TORQUE_LIMIT, GRIPPER_TORQUE_LIMIT = 1000, 500  # 0.1 %
TORQUE_RAMP = (0.15, 0.4, 0.7, 1.0)
RAMP_PAUSE = 0.05  # s
FASTEST = 6000
"""Steps/s; a joint that seems to move faster has been read wrongly."""

ADVICE = {
    r.Condition.VOLTAGE: "Check the motor supply.",
    r.Condition.OVERHEATING: "Let it cool down.",
    r.Condition.OVERLOAD: "Take the load off, then reset.",
}


class So101Driver:
    """An SO101 follower on serial port `port` with LeRobot's `calibration`; a `RobotDriver`.

    `clock` is monotonic (s). Other `options` are those of `FeetechBus`.
    """

    def __init__(
        self,
        port: str,
        calibration: Mapping[str, JointCalibration],
        *,
        clock: Callable[[], float] = time.monotonic,
        **options,
    ):
        check_calibration(calibration, "The calibration")
        self.calibration = {name: calibration[name] for name in JOINTS}
        self.info = so101_info(self.calibration)
        self.bus = FeetechBus(port, {name: it.id for name, it in self.calibration.items()}, **options)
        self._clock = clock
        self._sequence = 0
        self._commanded: np.ndarray | None = None
        self._last: tuple[float, dict[str, ServoStatus]] | None = None

    def open(self) -> None:
        """Take the port; check every servo's model and that it carries this calibration. Moves nothing."""
        self.bus.open()
        self._last = None
        for name, calibration in self.calibration.items():
            model = patient(self.bus.read, name, r.MODEL_NUMBER)
            if model != r.MODEL_STS3215:
                raise NotCalibrated(f"Servo {calibration.id} ('{name}') is model {model}, not an STS3215.")
            for register, expected in calibration.eeprom.items():
                found = patient(self.bus.read, name, register)
                if found != expected:
                    raise NotCalibrated(
                        f"Servo {calibration.id} ('{name}') carries {found} at address {register.address},"
                        f" the calibration {expected}: these are two arms, or it was calibrated again."
                    )

    def write_calibration(self) -> None:
        """Write the calibration into the servos' flash, which shifts what their positions mean.

        The bus must be open and every joint without torque, or `NotCalibrated` is raised: a joint that holds
        would leap.
        """
        write_calibration(self.bus, self.calibration)

    def enable(self) -> None:
        """Hold the arm where it is: limits, goal := present, then torque, raised in steps.

        A joint that has torque already keeps it.
        """
        status = patient(self.bus.status)
        limp = [name for name, it in status.items() if not it.torque]
        for name, joint in zip(JOINTS, self.info.joints, strict=True):
            self._write_limits(name, joint, TORQUE_RAMP[0] if name in limp else 1.0)
            patient(self.bus.write, name, r.GOAL_POSITION, self._reachable(name, status[name].position))
        for name in limp:
            patient(self.bus.write, name, r.TORQUE_ENABLE, 1)
        for share in TORQUE_RAMP[1:] if limp else ():
            time.sleep(RAMP_PAUSE)
            for name in limp:
                patient(self.bus.write, name, r.TORQUE_LIMIT, round(share * torque_limit(name)))
        self._commanded = None

    def read(self) -> State:
        """Return a fresh sample of all joints."""
        now = self._clock()
        status = self.bus.status()
        self._check_plausible(now, status)
        self._last = (now, status)
        self._sequence += 1
        return State(
            time=now,
            sequence=self._sequence,
            q=np.array([self._position(name, it.position) for name, it in status.items()]),
            enabled=tuple(it.torque == 1 for it in status.values()),
            dq=np.array([self._velocity(name, it.velocity) for name, it in status.items()]),
            tau=np.array([it.load / 1000 * STALL_TORQUE for it in status.values()]),
            q_commanded=self._commanded,
            faults=tuple(servo_fault(name, it) for name, it in status.items() if it.conditions),
            temperature=np.array([float(it.temperature) for it in status.values()]),
            voltage=np.array([it.voltage for it in status.values()]),
        )

    def write(self, q: np.ndarray, dq: np.ndarray | None = None) -> None:
        """Send goal positions `q` (6,) in the joints' units; `dq` is not used by these servos.

        Raises `LimitViolation` for what is not finite or not inside the calibrated limits.
        """
        q = np.asarray(q, float)
        tolerance = 1e-6
        if (
            q.shape != (len(JOINTS),)
            or not ((q >= self.info.lower - tolerance) & (q <= self.info.upper + tolerance)).all()
        ):
            raise LimitViolation(f"The SO101 was sent {q.tolist()}, which is outside its calibrated limits.")
        self.bus.write_goals({name: self._steps(name, value) for name, value in zip(JOINTS, q, strict=True)})
        self._commanded = q.copy()

    def hold(self) -> None:
        """Command the present position."""
        status = self.bus.status()
        self.bus.write_goals({name: self._reachable(name, it.position) for name, it in status.items()})

    def disable(self) -> list[DriverFault]:
        """Release every joint on its own; return what is not known to be released. Never raises.

        An error bit in the acknowledgement does not mean that the joint still has torque, and an old
        acknowledgement may be taken for the new one: what counts is the torque that is read back.
        """
        failed: list[DriverFault] = []
        for name in JOINTS:
            try:
                self._release(name)
            except DriverFault as fault:
                failed.append(fault)
        return failed

    def _release(self, name: str) -> None:
        with contextlib.suppress(BusTimeout, BusCorrupt):
            patient(self.bus.write, name, r.TORQUE_ENABLE, 0)
        if patient(self.bus.read, name, r.TORQUE_ENABLE):
            raise ServoFault(name, ["torque that cannot be switched off"], "Switch the motor supply off.")

    def clear_faults(self) -> None:
        """Rewrite the torque of complaining joints, which ends an overload, after goal := present."""
        for name, it in patient(self.bus.status).items():
            if it.conditions:
                patient(self.bus.write, name, r.GOAL_POSITION, self._reachable(name, it.position))
                patient(self.bus.write, name, r.TORQUE_ENABLE, it.torque)

    def close(self) -> None:
        """Give the port back; torque stays as it is."""
        self.bus.close()

    def _write_limits(self, name: str, joint: Joint, torque_share: float) -> None:
        steps = 1 / self._scale(name)
        acceleration = min(math.ceil(HEADROOM * joint.acceleration * steps / 100), 254)
        patient(self.bus.write, name, r.ACCELERATION, acceleration)
        patient(self.bus.write, name, r.GOAL_VELOCITY, math.ceil(HEADROOM * joint.velocity * steps))
        patient(self.bus.write, name, r.TORQUE_LIMIT, round(torque_share * torque_limit(name)))

    def _check_plausible(self, now: float, status: Mapping[str, ServoStatus]) -> None:
        """Raise `BusCorrupt` if a joint moved faster than a servo can."""
        if self._last is None:
            return
        then, before = self._last
        leap = FASTEST * max(now - then, 0.01)
        wild = [name for name, it in status.items() if abs(it.position - before[name].position) > leap]
        if wild:
            raise BusCorrupt(
                wild, f"The position of {wild} leapt further than a servo can move; not believed."
            )

    def _scale(self, name: str) -> float:
        """Units of the joint per step."""
        calibration = self.calibration[name]
        return 1 / (calibration.range_max - calibration.range_min) if name == GRIPPER else RADIANS_PER_STEP

    def _position(self, name: str, steps: int) -> float:
        calibration = self.calibration[name]
        return calibration.to_fraction(steps) if name == GRIPPER else calibration.to_angle(steps)

    def _velocity(self, name: str, steps: int) -> float:
        turned = name == GRIPPER and self.calibration[name].drive_mode
        return steps * self._scale(name) * (-1 if turned else 1)

    def _steps(self, name: str, value: float) -> int:
        calibration = self.calibration[name]
        return self._reachable(
            name, calibration.from_fraction(value) if name == GRIPPER else calibration.from_angle(value)
        )

    def _reachable(self, name: str, steps: int) -> int:
        calibration = self.calibration[name]
        return min(max(steps, calibration.range_min), calibration.range_max)


def make_so101(
    port: str, calibration: str | Path | Mapping[str, Mapping[str, int]], **options
) -> So101Driver:
    """Return the driver of the arm at `port`. `calibration` is LeRobot's ``<id>.json``, or its content.

    Raises `NotCalibrated` if that is not the calibration of an SO101.
    """
    if isinstance(calibration, Mapping):
        read = parse_calibration(calibration, "The calibration")
    else:
        read = load_calibration(Path(calibration))
    return So101Driver(port, read, **options)


def so101_info(calibration: Mapping[str, JointCalibration]) -> DriverInfo:
    """Describe an SO101 with this calibration: its limits are the calibrated ranges."""
    joints = []
    for name in JOINTS:
        it = calibration[name]
        if name == GRIPPER:
            joints.append(Joint(name, 0.0, 1.0, VELOCITY, ACCELERATION, unit="fraction", kind="gripper"))
        else:
            lower, upper = it.to_angle(it.range_min), it.to_angle(it.range_max)
            joints.append(Joint(name, lower, upper, VELOCITY, ACCELERATION, STALL_TORQUE))
    return DriverInfo(
        name="so101",
        joints=tuple(joints),
        control_rate=100.0,
        power_off="falls",
        safety=frozenset({"hw_limits"}),
        telemetry=frozenset({"velocity", "effort", "temperature", "voltage", "faults"}),
        rest=tuple(
            joint.lower + share * (joint.upper - joint.lower)
            for joint, share in zip(joints, REST, strict=True)
        ),
    )


def torque_limit(name: str) -> int:
    """Return the joint's ``TORQUE_LIMIT``; a gripper that holds something must not burn out."""
    return GRIPPER_TORQUE_LIMIT if name == GRIPPER else TORQUE_LIMIT


def servo_fault(name: str, status: ServoStatus) -> ServoFault:
    """Return the joint's conditions as a fault with advice."""
    advice = [words for flag, words in ADVICE.items() if status.conditions & flag]
    return ServoFault(name, r.Condition.words(status.conditions), " ".join(advice))

"""What is wrong with this arm? Every servo, register and reply looked at, without motion or torque."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..faults import BusCorrupt, BusTimeout, Disconnected, DriverFault, NotCalibrated
from . import registers as r
from .bus import FeetechBus, ServoStatus, patient
from .calibration import JOINTS, Calibration

BAUD_RATE = 1_000_000
SCANNED_IDS = range(1, 21)
SCAN_TIMEOUT = 0.008
"""Seconds that a servo has to answer a scan's question."""

PINGS = 2
"""Questions to an id before it counts as free."""

SAMPLES = 100
"""Status blocks read to judge the line."""

HOT = 10  # °C below the servo's own limit
SLOW_READ = 0.012  # s; an FTDI chip as it comes takes 16 ms, every other adapter 2 to 6


@dataclass(frozen=True)
class Finding:
    """One line of a report. `remedy` says what to do, and is empty if all is well."""

    what: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class FoundServo:
    """A servo that answered. Voltage in V, temperature in °C, position in steps."""

    port: str
    baudrate: int
    id: int
    model: int
    firmware: str
    torque: int
    position: int
    voltage: float
    temperature: int
    conditions: tuple[str, ...]


def scan_port(
    port: str,
    baudrates: Sequence[int] = r.BAUD_RATES,
    ids: Sequence[int] = SCANNED_IDS,
    reply_timeout: float = SCAN_TIMEOUT,
) -> list[FoundServo]:
    """Return every servo that answers at `port`, at whatever rate. Raises `Disconnected` without a port.

    Raises `BusCorrupt` where replies are damaged at one id: two servos share it.
    """
    found = []
    for baudrate in baudrates:
        bus = FeetechBus(port, {str(id): id for id in ids}, baudrate=baudrate, reply_timeout=reply_timeout)
        bus.open()
        try:
            for name in bus.joints:
                servo = _look_at(bus, name)
                found += [servo] if servo is not None else []
        finally:
            bus.close()
    return found


def _look_at(bus: FeetechBus, name: str) -> FoundServo | None:
    """Return what the servo says of itself; None if it does not answer."""
    for _ in range(PINGS):
        try:
            conditions = bus.ping(name)
            break
        except BusTimeout:
            continue
        except BusCorrupt:
            conditions = patient(bus.ping, name)  # noise of the rate before, or two servos of this id
            break
    else:
        return None
    read = {
        register: patient(bus.read, name, register)
        for register in (
            r.MODEL_NUMBER,
            r.FIRMWARE_MAJOR,
            r.FIRMWARE_MINOR,
            r.TORQUE_ENABLE,
            r.PRESENT_POSITION,
            r.PRESENT_VOLTAGE,
            r.PRESENT_TEMPERATURE,
        )
    }
    return FoundServo(
        port=bus.port,
        baudrate=bus.baudrate,
        id=bus.joints[name],
        model=read[r.MODEL_NUMBER],
        firmware=f"{read[r.FIRMWARE_MAJOR]}.{read[r.FIRMWARE_MINOR]}",
        torque=read[r.TORQUE_ENABLE],
        position=read[r.PRESENT_POSITION],
        voltage=read[r.PRESENT_VOLTAGE] / 10,
        temperature=read[r.PRESENT_TEMPERATURE],
        conditions=r.Condition.words(conditions),
    )


def examine(
    port: str, calibration: Calibration | NotCalibrated, reply_timeout: float = 0.02
) -> list[Finding]:
    """Return the findings on the arm at `port`, the later ones only if the earlier ones allow them.

    `calibration` is the arm's, or why there is none.
    """
    ids = {name: id for id, name in enumerate(JOINTS, 1)}
    if not isinstance(calibration, NotCalibrated):
        ids = {name: calibration[name].id for name in JOINTS}
    bus = FeetechBus(port, ids, baudrate=BAUD_RATE, reply_timeout=reply_timeout)
    try:
        bus.open()
    except Disconnected as fault:
        return [Finding("port", "not open", str(fault))]
    try:
        findings = [Finding("port", port), presence(bus)]
        if findings[-1].remedy:
            return findings
        status = patient(bus.status)
        return [
            *findings,
            models(bus),
            firmware(bus),
            calibrated(bus, calibration, status),
            *health(bus, status),
            line(bus),
        ]
    except DriverFault as fault:
        return [*findings, Finding("line", "the arm stopped answering", str(fault))]
    finally:
        bus.close()


def presence(bus: FeetechBus) -> Finding:
    """Do all six servos answer?"""
    silent = []
    for name in bus.joints:
        try:
            patient(bus.ping, name)
        except BusTimeout:
            silent.append(name)
        except BusCorrupt as fault:
            return Finding("servos", f"servo {bus.joints[name]} ('{name}') answers damaged", str(fault))
    if not silent:
        return Finding("servos", f"all {len(bus.joints)} answer at {bus.baudrate} baud")
    if len(silent) == len(bus.joints):
        return Finding("servos", "none answers", _why_silent(bus))
    first = silent[0]
    return Finding(
        "servos",
        f"{', '.join(f'{name!r} (servo {bus.joints[name]})' for name in silent)} not found",
        f"Check the cable that leads to servo {bus.joints[first]} ('{first}'); if it is well, the servo may"
        " carry another id: `vla robot scan` lists those that answer, `lerobot-setup-motors` sets ids.",
    )


def _why_silent(bus: FeetechBus) -> str:
    """Return the remedy for a bus without any answer: another rate, or no supply."""
    bus.close()
    try:
        for baudrate in (rate for rate in r.BAUD_RATES if rate != bus.baudrate):
            found = scan_port(bus.port, [baudrate], list(bus.joints.values()), bus.reply_timeout)
            if found:
                return (
                    f"{len(found)} servos answer at {baudrate} baud, the arm is driven at {bus.baudrate}: set"
                    " them with `lerobot-setup-motors --robot.type=so101_follower --robot.port="
                    + bus.port
                    + "`."
                )
    except DriverFault as fault:
        return str(fault)
    return (
        "Switch the motor supply on (USB alone does not feed the servos), and check the cable from the"
        " adapter to servo 1; if another device answers here, this is the wrong port."
    )


def models(bus: FeetechBus) -> Finding:
    """Are they the servos of an SO101?"""
    found = {name: patient(bus.read, name, r.MODEL_NUMBER) for name in bus.joints}
    wrong = {name: model for name, model in found.items() if model != r.MODEL_STS3215}
    if not wrong:
        return Finding("model", "STS3215")
    return Finding(
        "model",
        ", ".join(f"'{name}' is model {model}" for name, model in wrong.items()),
        f"An SO101 follower has STS3215 servos (model {r.MODEL_STS3215}): this is another arm, or has another"
        " servo in it.",
    )


def firmware(bus: FeetechBus) -> Finding:
    """Is the firmware the same everywhere? LeRobot refuses arms where it is not."""
    found = {
        f"{patient(bus.read, name, r.FIRMWARE_MAJOR)}.{patient(bus.read, name, r.FIRMWARE_MINOR)}"
        for name in bus.joints
    }
    remedy = "LeRobot will refuse this arm: bring all servos to one version with Feetech's FD software."
    return Finding("firmware", ", ".join(sorted(found)), remedy if len(found) > 1 else "")


def calibrated(
    bus: FeetechBus, calibration: Calibration | NotCalibrated, status: Mapping[str, ServoStatus]
) -> Finding:
    """Do the servos carry the calibration of the file, and is every joint inside it?"""
    if isinstance(calibration, NotCalibrated):
        return Finding("calibration", "none", str(calibration))
    for name in JOINTS:
        for register, expected in calibration[name].eeprom.items():
            found = patient(bus.read, name, register)
            if found != expected:
                return Finding(
                    "calibration",
                    f"'{name}' carries {found} at address {register.address}, the file says {expected}",
                    "The file is of another arm, or older than the arm's last calibration: calibrate again,"
                    " or `vla robot calibrate --from-file FILE` writes the file into the servos.",
                )
    outside = [
        name
        for name, it in status.items()
        if not calibration[name].range_min - 40 <= it.position <= calibration[name].range_max + 40
    ]
    remedy = "Move them inside by hand, without torque; if they are inside, calibrate again."
    found = f"{', '.join(outside)} outside their range" if outside else "as the file says"
    return Finding("calibration", found, remedy if outside else "")


def health(bus: FeetechBus, status: Mapping[str, ServoStatus]) -> list[Finding]:
    """Voltage, temperature, torque and complaints of all servos."""
    volts, degrees = [it.voltage for it in status.values()], [it.temperature for it in status.values()]
    first = next(iter(bus.joints))
    low, high = (patient(bus.read, first, it) / 10 for it in (r.MIN_VOLTAGE_LIMIT, r.MAX_VOLTAGE_LIMIT))
    hottest = patient(bus.read, first, r.MAX_TEMPERATURE_LIMIT)
    on = [name for name, it in status.items() if it.torque]
    torque = "none" if not on else "all joints" if len(on) == len(status) else f"only {', '.join(on)}"
    complaints = {name: r.Condition.words(it.conditions) for name, it in status.items() if it.conditions}
    return [
        Finding(
            "supply",
            f"{min(volts):.1f} to {max(volts):.1f} V",
            ""
            if low <= min(volts) and max(volts) <= high
            else f"The servos want {low:g} to {high:g} V: check the supply and its cable.",
        ),
        Finding(
            "temperature",
            f"up to {max(degrees)} °C",
            "" if max(degrees) < hottest - HOT else "Let the arm cool down before it works.",
        ),
        Finding(
            "torque",
            torque,
            ""
            if len(on) in (0, len(status))
            else "The arm holds with some joints only: support it, then"
            " `vla robot rest` takes hold of all joints and lays it down.",
        ),
        Finding(
            "status",
            "; ".join(f"'{name}': {', '.join(words)}" for name, words in complaints.items())
            or "no complaint",
            "Take the load off and let it cool; switching the supply off and on clears what remains."
            if complaints
            else "",
        ),
    ]


def line(bus: FeetechBus) -> Finding:
    """How fast and how reliably does the status block come?"""
    seconds, lost = [], 0
    for _ in range(SAMPLES):
        begin = time.perf_counter()
        try:
            bus.status()
        except (BusTimeout, BusCorrupt):
            lost += 1
        seconds.append(time.perf_counter() - begin)
    p50, p99 = np.percentile(seconds, [50, 99])
    remedy = ""
    if lost > SAMPLES // 50:
        remedy = "Replies are lost: check every plug, try another USB cable, keep motor and USB cables apart."
    elif p50 > SLOW_READ:
        remedy = (
            "The adapter answers slowly: if it has an FTDI chip, set its latency timer to 1 ms"
            " (`echo 1 | sudo tee /sys/bus/usb-serial/devices/ttyUSB*/latency_timer`); else see what else"
            " keeps this computer busy."
        )
    return Finding("line", f"{1e3 * p50:.1f} ms per read, p99 {1e3 * p99:.1f} ms, {lost} lost", remedy)

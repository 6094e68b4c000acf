"""Any LeRobot robot as a `RobotDriver`: its dictionaries in and out, our safety filter and supervisor above.

LeRobot's robots know no limits, so these must be given. What the adapter cannot give such an arm: connecting
may switch torque off for a moment and then on (an SO101's does), servo-side limits are LeRobot's, and status
bits are not read. What it does beside translating: stale replies are thrown away before every transaction, a
port that an exception left marked as busy is freed, limp joints are looked for, every joint is released on
its own, and an arm whose object is forgotten is not dropped.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import pkgutil
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vla.errors import UserError

from ..driver import DriverInfo, Joint, Kind, PowerOff, State, Unit
from ..faults import BusCorrupt, BusTimeout, Disconnected, DriverFault, NotCalibrated, ServoFault

LINK_ERRORS = (OSError, termios.error)
"""What LeRobot lets through when a port is gone; `ConnectionError`, an `OSError`, also for lost replies."""

GARBAGE = (IndexError, KeyError, ValueError, RuntimeError, TypeError)
"""What LeRobot's motor buses raise on replies that they did not expect, and for status bits on a write."""

TORQUE_EVERY = 5
"""Samples between looks at the torque of a motor bus."""

SCALE: dict[str, tuple[Unit, float]] = {
    "deg": ("rad", math.pi / 180),
    "rad": ("rad", 1.0),
    "m": ("m", 1.0),
    "percent": ("fraction", 0.01),
}
"""Our unit, and how many of it one of the robot's own is."""


@dataclass(frozen=True)
class LeRobotJoint:
    """One joint as LeRobot has it: limits, velocity (1/s) and acceleration (1/s²) in the robot's own unit."""

    lower: float
    upper: float
    velocity: float
    acceleration: float
    unit: Literal["deg", "rad", "m", "percent"] = "deg"
    kind: Kind = "revolute"

    def __post_init__(self):
        if self.unit not in SCALE:
            raise UserError(f"A joint's unit is {self.unit!r}: give one of {', '.join(SCALE)}.")

    def joint(self, name: str) -> Joint:
        """Return the joint in our units."""
        unit, scale = SCALE[self.unit]
        bounds = (scale * it for it in (self.lower, self.upper, self.velocity, self.acceleration))
        return Joint(name, *bounds, unit=unit, kind=self.kind)


class LeRobotAdapter:
    """`robot` (a `lerobot.robots.Robot` that is not connected) as a driver.

    `joints` describes every ``<name>.pos`` of the robot's actions, in their order; `rest` is the pose in
    which the arm may be released, in the robot's own units. Raises `UserError` if the joints do not match.
    """

    def __init__(
        self,
        robot: Any,
        joints: Mapping[str, LeRobotJoint],
        rest: Mapping[str, float] | None = None,
        *,
        control_rate: float = 30.0,
        power_off: PowerOff = "falls",
        clock: Callable[[], float] = time.monotonic,
    ):
        names = [key.removesuffix(".pos") for key in robot.action_features if key.endswith(".pos")]
        for what, given in (("joints", joints), ("rest pose", joints if rest is None else rest)):
            if set(given) != set(names):
                raise UserError(f"The {what} given are of {sorted(given)}, the robot has {sorted(names)}.")
        self.robot, self._clock = robot, clock
        self._names = names
        self._scale = np.array([SCALE[joints[name].unit][1] for name in names])
        self.info = DriverInfo(
            name=robot.name,
            joints=tuple(joints[name].joint(name) for name in names),
            control_rate=control_rate,
            power_off=power_off,
            rest=None if rest is None else tuple(np.array([rest[name] for name in names]) * self._scale),
        )
        self._sequence = 0
        self._enabled = (True,) * len(names)
        self._commanded: np.ndarray | None = None
        if hasattr(robot.config, "disable_torque_on_disconnect"):
            robot.config.disable_torque_on_disconnect = False  # `close` and `__del__` must not drop the arm

    def open(self) -> None:
        """Connect. LeRobot configures the motors here, which may switch their torque off and on."""
        try:
            self.robot.connect(calibrate=False)
            calibrated = self.robot.is_calibrated
        except LINK_ERRORS as error:
            self.close()
            raise Disconnected(f"'{self.info.name}' cannot be connected: {_words(error)}.") from None
        except GARBAGE as error:
            self.close()
            raise BusCorrupt(self._names, f"'{self.info.name}' answers wrongly: {_words(error)}.") from None
        if not calibrated:
            self.close()
            raise NotCalibrated(f"'{self.info.name}' does not carry its calibration: calibrate it first.")

    def enable(self) -> None:
        """Command the present position."""
        self.hold()

    def read(self) -> State:
        """Return a fresh sample; looks at the torque of a motor bus now and then."""
        now = self._clock()
        observation = self._transact(self.robot.get_observation)
        if self._bus is not None and self._sequence % TORQUE_EVERY == 0:
            torque = self._transact(self._bus.sync_read, "Torque_Enable", normalize=False)
            self._enabled = tuple(torque.get(name, 1) != 0 for name in self._names)
        self._sequence += 1
        try:
            q = np.array([float(observation[f"{name}.pos"]) for name in self._names]) * self._scale
        except (KeyError, TypeError, ValueError) as error:
            raise BusCorrupt(self._names, f"An observation lacks positions: {_words(error)}.") from None
        return State(now, self._sequence, q, self._enabled, q_commanded=self._commanded)

    def write(self, q: np.ndarray, dq: np.ndarray | None = None) -> None:
        """Send an action; `dq` is not used."""
        values = (np.asarray(q, float) / self._scale).tolist()
        action = {f"{name}.pos": value for name, value in zip(self._names, values, strict=True)}
        self._transact(self.robot.send_action, action)
        self._commanded = np.array(q, float)

    def hold(self) -> None:
        """Command the present position."""
        self.write(self.read().q)

    def disable(self) -> list[DriverFault]:
        """Release every joint of a motor bus on its own; other robots as a whole. Never raises."""
        if self._bus is None:
            return self._disconnect()
        failed: list[DriverFault] = []
        for name in self._names:
            try:
                self._release(name)
            except DriverFault as fault:
                failed.append(fault)
        return failed

    def clear_faults(self) -> None:
        """LeRobot has no word for it."""

    def close(self) -> None:
        """Give the link back; a robot that knows `disable_torque_on_disconnect` keeps its torque."""
        self._disconnect()

    @property
    def _bus(self) -> Any | None:
        """The motor bus, if the robot has one."""
        bus = getattr(self.robot, "bus", None)
        return bus if hasattr(bus, "sync_read") else None

    def _release(self, name: str) -> None:
        # A status bit in the acknowledgement is a failure to LeRobot, although the servo has obeyed; reading
        # together ignores such bits.
        with contextlib.suppress(BusCorrupt):
            self._transact(self._bus.write, "Torque_Enable", name, 0, normalize=False, num_retry=3)
        torque = self._transact(self._bus.sync_read, "Torque_Enable", name, normalize=False, num_retry=3)
        if torque[name]:
            raise ServoFault(name, ["torque that cannot be switched off"], "Switch the motor supply off.")

    def _disconnect(self) -> list[DriverFault]:
        try:
            self._tidy()
            self.robot.disconnect()
        except (*LINK_ERRORS, *GARBAGE) as error:
            port = getattr(self._bus, "port_handler", None)
            if port is not None and getattr(port, "ser", None) is not None:
                port.ser.close()  # LeRobot leaves it open, and the next connection would be refused
                port.is_open = False
            return [Disconnected(f"'{self.info.name}' was not disconnected in order: {_words(error)}.")]
        return []

    def _transact(self, call: Callable, *arguments: Any, **options: Any) -> Any:
        """Call the robot; nothing but `DriverFault` leaves."""
        try:
            self._tidy()
            return call(*arguments, **options)
        except ConnectionError as error:
            if not self.robot.is_connected:
                raise Disconnected(f"'{self.info.name}' is not connected: {_words(error)}.") from None
            raise BusTimeout(self._names, f"'{self.info.name}' did not answer: {_words(error)}.") from None
        except LINK_ERRORS as error:
            raise Disconnected(f"The link to '{self.info.name}' is gone: {_words(error)}.") from None
        except GARBAGE as error:
            raise BusCorrupt(self._names, f"'{self.info.name}' answers wrongly: {_words(error)}.") from None

    def _tidy(self) -> None:
        """Throw away replies that came too late, and free a port that an exception left busy."""
        port = getattr(self._bus, "port_handler", None)
        if port is not None and getattr(port, "is_open", False):
            port.is_using = False
            port.ser.reset_input_buffer()


def make_lerobot(
    type: str,
    joints: Mapping[str, Mapping[str, Any]],
    rest: Mapping[str, float],
    config: Mapping[str, Any],
    **options: Any,
) -> LeRobotAdapter:
    """Return the driver of the LeRobot robot `type` with its own `config`; plug-ins count.

    `joints` maps names to the fields of `LeRobotJoint`. Raises `UserError` for what LeRobot does not know.
    """
    import lerobot.robots
    from lerobot.robots import RobotConfig, make_robot_from_config
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    for module in pkgutil.iter_modules(lerobot.robots.__path__):  # LeRobot's own register when imported
        if type not in RobotConfig.get_known_choices():
            with contextlib.suppress(ImportError):  # of an arm whose packages are not installed
                importlib.import_module(f"lerobot.robots.{module.name}")
    known = RobotConfig.get_known_choices()
    if type not in known:
        raise UserError(f"LeRobot knows no robot '{type}', only {', '.join(sorted(known))}.")
    content = {key: Path(value) if key == "calibration_dir" else value for key, value in config.items()}
    try:
        robot = make_robot_from_config(known[type](**content))
        described = {name: LeRobotJoint(**joint) for name, joint in joints.items()}
    except TypeError as error:
        raise UserError(f"The robot '{type}' or its joints have no such setting: {error}.") from None
    return LeRobotAdapter(robot, described, rest, **options)


def _words(error: Exception | Sequence) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__

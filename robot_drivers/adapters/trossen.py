"""A Trossen WidowX AI behind the interface of every arm: over the network, by its makers' own driver.

    ArmConfig("trossen", {"address": "192.168.1.2"})        # pip install 'lerobot_policy_cogmerge[trossen]'

Between us and the controller runs a thread of the makers' driver, which answers every question from the
newest datagram it has. What that hides, and what is done about it here:

- A controller that falls silent raises nothing: the same sample is given for ever. Samples are numbered, and
  one that does not count on is `BusTimeout`.
- An error of the controller is raised by every call from then on. It is reported as a fault of the sample,
  so that the arm is latched as faulty instead of lost; `clear_faults` connects anew.
- Connecting and disconnecting brake the joints (mode *idle*): torque cannot be taken over, nor left behind.
- Answers over TCP may take as long as `timeout` (s), and are asked for only while the controller is alive.

Joints and limits are the WidowX AI's; angles in rad, the gripper's jaw in m.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vla.errors import UserError

from ..driver import DriverInfo, Joint, State
from ..faults import BusTimeout, Disconnected, DriverFault, LimitViolation

GRIPPER = "left_carriage_joint"
LIMITS: dict[str, tuple[float, float]] = {
    "joint_0": (-3.054, 3.054),
    "joint_1": (0.0, 3.1415),
    "joint_2": (0.0, 2.356),
    "joint_3": (-1.5707, 1.5707),
    "joint_4": (-1.5707, 1.5707),
    "joint_5": (-3.1415, 3.1415),
    GRIPPER: (0.0, 0.044),
}
"""The controller's factory settings, rounded inwards; rad, and m of the gripper's jaw."""

VELOCITY, ACCELERATION = 1.5, 6.0  # rad/s, rad/s²; the joints can do 3.14 rad/s
GRIPPER_VELOCITY, GRIPPER_ACCELERATION = 0.1, 0.5  # m/s, m/s²
EFFORT, GRIPPER_EFFORT = 27.0, 100.0  # N·m, N
RATE = 100.0  # Hz

FRESH = 0.03
"""Seconds in which a living controller numbers a new sample; it makes several per millisecond."""

LOOK_AGAIN = 0.0005  # s
MODES_EVERY = 50
"""Samples between questions for the joints' modes, which go over TCP."""

CONTROLLER_ERROR = "Error occurred:"
"""How the makers' driver begins what the controller itself complains of."""


class TrossenDriver:
    """A WidowX AI follower at `address`; a `RobotDriver`.

    `limits` (joint to lower and upper) replace the factory's where the controller was set otherwise. Raises
    `UserError` if the makers' driver is not installed.
    """

    def __init__(
        self,
        address: str,
        limits: Mapping[str, Sequence[float]] | None = None,
        *,
        timeout: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._vendor = _vendor()
        self.info = trossen_info(limits or {})
        self.address, self.timeout, self._clock = address, timeout, clock
        self._driver: Any | None = None
        self._number = -1  # of the newest sample
        self._state: State | None = None
        self._sequence = 0
        self._modes = (False,) * len(LIMITS)  # in position mode: energised
        self._commanded: np.ndarray | None = None

    def open(self) -> None:
        """Connect, which brakes the joints, and check that the controller's limits hold ours."""
        self._connect(clear_error=False)
        try:
            self._check_limits()
        except DriverFault:
            self.close()
            raise

    def enable(self) -> None:
        """Take hold of the arm where it is."""
        self._call(self._held.set_all_modes, self._vendor.Mode.position)
        self._modes = (True,) * len(self._modes)
        self._hold(self.timeout)  # switching modes may keep the controller from its samples for a while
        self._commanded = None

    def read(self) -> State:
        """Return a sample that is newer than the last one; the last one with its faults after an error."""
        return self._read(FRESH)

    def _read(self, patience: float) -> State:
        now = self._clock()
        try:
            output = self._next_output(patience)
        except DriverFault as fault:
            if not _is_controllers(fault) or self._state is None:
                raise
            self._modes = (False,) * len(self._modes)  # the controller has braked them
            return self._sample(now, self._state.q, faults=(fault,))
        if self._sequence % MODES_EVERY == 0:
            position = self._vendor.Mode.position
            self._modes = tuple(mode == position for mode in self._call(self._held.get_modes))
        joints = output.joint.all
        self._state = self._sample(
            now,
            np.array(joints.positions),
            dq=np.array(joints.velocities),
            tau=np.array(joints.efforts),
            temperature=np.array(joints.rotor_temperatures),
        )
        return self._state

    def write(self, q: np.ndarray, dq: np.ndarray | None = None) -> None:
        """Send goals `q` (7,), reached on a straight line within one control period; `dq` is not used.

        Raises `LimitViolation` for what is not finite or not inside the limits.
        """
        q = np.asarray(q, float)
        info, tolerance = self.info, 1e-6
        inside = q.shape == info.lower.shape and (
            (q >= info.lower - tolerance) & (q <= info.upper + tolerance)
        )
        if not np.all(inside):
            raise LimitViolation(f"'{info.name}' was sent {q.tolist()}, which is outside its limits.")
        try:
            self._call(self._held.set_all_positions, q.tolist(), 1 / RATE, False)
        except DriverFault as fault:
            if not _is_controllers(fault):
                raise
            raise BusTimeout(self.info.joint_names, str(fault)) from None  # `read` reports it as a fault
        self._commanded = q.copy()

    def hold(self) -> None:
        """Command the present position."""
        self._hold(FRESH)

    def _hold(self, patience: float) -> None:
        self.write(np.clip(self._read(patience).q, self.info.lower, self.info.upper))

    def disable(self) -> list[DriverFault]:
        """Brake all joints and see that they are; return one fault for all if that fails. Never raises."""
        try:
            try:
                self._brake()
            except DriverFault:
                self.clear_faults()  # connects anew, which brakes
                self._brake()
        except DriverFault as fault:
            return [BusTimeout(self.info.joint_names, f"The brakes are not known to be on. {fault}")]
        return []

    def clear_faults(self) -> None:
        """Connect anew and clear the controller's error; the joints are braked."""
        self.close()
        self._connect(clear_error=True)

    def close(self) -> None:
        """Disconnect, which brakes the joints. Idempotent, never raises."""
        driver, self._driver = self._driver, None
        if driver is not None:
            with contextlib.suppress(RuntimeError, AssertionError):
                driver.cleanup()

    @property
    def _held(self) -> Any:
        """The makers' driver while it is connected: after its cleanup it would give zeros."""
        if self._driver is None:
            raise Disconnected(f"'{self.info.name}' at {self.address} is not connected.")
        return self._driver

    def _connect(self, clear_error: bool) -> None:
        vendor = self._vendor
        driver = vendor.TrossenArmDriver()
        driver.set_log_level(vendor.LogLevel.critical)
        hand = vendor.StandardEndEffector.wxai_v0_follower
        self._call(driver.configure, vendor.Model.wxai_v0, hand, self.address, clear_error, self.timeout)
        self._driver, self._number = driver, -1
        self._modes = (False,) * len(self._modes)

    def _check_limits(self) -> None:
        """Raise `LimitViolation` if the controller would refuse a goal within our limits."""
        for joint, theirs in zip(self.info.joints, self._call(self._held.get_joint_limits), strict=True):
            low, high = theirs.position_min, theirs.position_max
            if joint.lower < low - 1e-6 or joint.upper > high + 1e-6:
                raise LimitViolation(
                    f"The controller lets '{joint.name}' move from {low:.4f} to {high:.4f} {joint.unit}, less"
                    f" than {joint.lower:g} to {joint.upper:g}: give the driver these `limits`."
                )

    def _next_output(self, patience: float) -> Any:
        """Return the makers' newest sample once its number has changed; `BusTimeout` after `patience` (s)."""
        until = time.monotonic() + patience
        while True:
            output = self._call(self._held.get_robot_output)
            if output.header.id != self._number:
                self._number = output.header.id
                return output
            if time.monotonic() > until:
                raise BusTimeout(
                    self.info.joint_names,
                    f"The controller of '{self.info.name}' at {self.address} is silent. Check its supply and"
                    " its network cable.",
                )
            time.sleep(LOOK_AGAIN)

    def _brake(self) -> None:
        idle = self._vendor.Mode.idle
        self._call(self._held.set_all_modes, idle)
        if any(mode != idle for mode in self._call(self._held.get_modes)):
            raise DriverFault(f"'{self.info.name}' does not brake.")
        self._modes = (False,) * len(self._modes)

    def _sample(self, now: float, q: np.ndarray, **sensed: Any) -> State:
        self._sequence += 1
        return State(now, self._sequence, q, self._modes, q_commanded=self._commanded, **sensed)

    def _call(self, call: Callable, *arguments: Any) -> Any:
        """Call the makers' driver; nothing but `DriverFault` leaves."""
        try:
            return call(*arguments)
        except (RuntimeError, AssertionError) as error:  # bases of the makers' own
            words = " ".join(str(error).split("Please refer to")[0].split()).rstrip(".")
            if words.startswith(CONTROLLER_ERROR):
                raise ControllerFault(f"The controller of '{self.info.name}' complains. {words}.") from None
            raise Disconnected(
                f"The link to '{self.info.name}' at {self.address} is gone: {words}."
            ) from None


class ControllerFault(DriverFault):
    """The controller is in an error state: joints braked, every call refused until it is cleared."""


def _is_controllers(fault: DriverFault) -> bool:
    return isinstance(fault, ControllerFault)


def trossen_info(limits: Mapping[str, Sequence[float]]) -> DriverInfo:
    """Describe a WidowX AI with these limits in place of the factory's."""
    unknown = sorted(set(limits) - set(LIMITS))
    if unknown:
        raise UserError(f"A WidowX AI has no joint {', '.join(unknown)}; it has {', '.join(LIMITS)}.")
    joints = tuple(
        Joint(name, *bounds, GRIPPER_VELOCITY, GRIPPER_ACCELERATION, GRIPPER_EFFORT, "m", "gripper")
        if name == GRIPPER
        else Joint(name, *bounds, VELOCITY, ACCELERATION, EFFORT)
        for name, bounds in ((name, limits.get(name, own)) for name, own in LIMITS.items())
    )
    return DriverInfo(
        name="widowx_ai",
        joints=joints,
        control_rate=RATE,
        power_off="brakes",
        safety=frozenset({"hw_limits", "brakes"}),
        telemetry=frozenset({"velocity", "effort", "temperature", "faults"}),
        rest=tuple(min(max(0.0, joint.lower), joint.upper) for joint in joints),  # folded, hand on the base
    )


def make_trossen(
    address: str, limits: Mapping[str, Sequence[float]] | None = None, **options: Any
) -> TrossenDriver:
    """Return the driver of the WidowX AI whose controller is at `address`."""
    return TrossenDriver(address, limits, **options)


def _vendor() -> Any:
    try:
        import trossen_arm
    except ImportError:
        raise UserError(
            "A Trossen arm needs its makers' driver: pip install 'lerobot_policy_cogmerge[trossen]'."
        ) from None
    return trossen_arm

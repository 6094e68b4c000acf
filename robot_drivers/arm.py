"""An arm whose bus lives in a process of its own: the client side, what `vla run` talks to.

    with Arm(ArmConfig("so101", {"port": "/dev/ttyACM0", "calibration": "arm.json"})) as arm:
        arm.open()                                  # identify and check; nothing moves
        arm.enable()                                # soft start, holds where it is
        while working:
            cycle = arm.latest()                    # newest sample, mode, fault: never older than the loop
            goal = policy(cycle.state.q)            # {joint: position}
            arm.setpoint(goal, within=period)       # evenly until the next one; does not wait
    # leaving the block: brake, ramp to rest, release each servo, port free

The other process samples, filters and commands at the arm's own rate whatever this one does. It leaves the
arm as `ending.leave` says, and ends, when this process ends (killed or not), when it says nothing for
`ArmConfig.heartbeat_timeout` while the arm is energised, and on SIGTERM, SIGINT or SIGHUP of its own. It does
not take part in the terminal's Ctrl-C: this side sees it, and leaves the block.

Every method is bounded in time, and raises the `DriverFault` or `ModeError` that the supervisor raised there,
or `ArmEnded` once the other process has left the arm. Methods may be called from several threads.
"""

from __future__ import annotations

import json
import math
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vla.errors import UserError

from .driver import DriverInfo
from .ending import Ending
from .faults import DriverFault, LimitViolation
from .safety_filter import SafetyFilter
from .supervisor import Cycle, SupervisorConfig
from .wire import cycle_from_json, fault_from_json, info_from_json
from .workspace import Workspace, corners

START_TIMEOUT = 60.0
"""Seconds for the other process to import and describe its arm; a busy machine takes its time."""

REQUEST_TIMEOUT = 20.0
"""Seconds for an answer; `enable` on a bus that loses replies is the longest."""

LEAVE_TIMEOUT = 90.0
"""Seconds for the slowest ramp to rest after a lost link."""

SEND_TIMEOUT = 1.0
"""Seconds for the other process to take a message: it never takes longer unless it is stopped."""


class ArmEnded(DriverFault):
    """The process that owned the arm has ended; `ending` is how it left the arm (None: it was killed)."""

    def __init__(self, message: str, ending: Ending | None):
        super().__init__(message)
        self.ending = ending


@dataclass(frozen=True)
class ArmConfig:
    """Which arm, and within which bounds. Everything is a JSON value.

    `driver` is a name of `arm_process.DRIVERS` or ``"package.module:function"``; the function is called with
    `arguments` and returns a `RobotDriver`. `rest` maps joint names to the pose in which the arm may be
    released (default: the driver's own, `DriverInfo.rest`). `rate` (Hz) defaults to the arm's control rate.
    `heartbeat_timeout` (s) is how long this process may be silent while the arm is energised; the supervisor
    has made the arm hold and rest before it is over. `record` is a file for every cycle, see `recorder`.
    `workspace` is a box ``(x0, x1, y0, y1, z0, z1)`` in metres for the gripper, see `workspace`.
    """

    driver: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    rest: Mapping[str, float] | None = None
    rate: float | None = None
    heartbeat_timeout: float = 5.0
    margin: float = 0.01
    following_error: float = 0.12
    supervisor: SupervisorConfig = field(default_factory=SupervisorConfig)
    record: str | Path | None = None
    workspace: Sequence[float] | None = None

    def __post_init__(self):
        if not self.heartbeat_timeout > 0 or (self.rate is not None and not 0 < self.rate <= 1000):
            raise UserError(
                f"The arm's heartbeat timeout is {self.heartbeat_timeout} s and its rate {self.rate} Hz: give"
                " positive numbers, the rate at most 1000."
            )
        if self.workspace is not None:
            corners(self.workspace)  # refuses

    def safety_filter(self, info: DriverInfo) -> SafetyFilter:
        """Return the filter of the arm that `info` describes. Raises `UserError` for a box that is none."""
        workspace = None if self.workspace is None else Workspace(self.workspace, info)
        return SafetyFilter(info, self.margin, self.following_error, workspace)

    def to_json(self) -> str:
        """Return the configuration as one JSON line."""
        content = asdict(self) | {"record": None if self.record is None else str(self.record)}
        try:
            return json.dumps(content)
        except TypeError as error:
            raise UserError(f"The arm's arguments must be JSON values ({error}).") from None


@dataclass(frozen=True)
class LoopTiming:
    """How regular the arm's loop was over the last `window` cycles; times in ms.

    `rate` is in Hz, `missed` counts deadlines missed since `open` (one per period that went by unused),
    `period_p99` and `period_max` are between cycles, `work_p99` is spent inside one.
    """

    cycles: int = 0
    missed: int = 0
    window: int = 0
    rate: float = 0.0
    period_p50: float = 0.0
    period_p99: float = 0.0
    period_max: float = 0.0
    work_p50: float = 0.0
    work_p99: float = 0.0


class Arm:
    """The handle on an arm in its own process; a context manager that leaves the arm at rest.

    `info` describes the arm before it is connected. Raises `UserError` if the process does not start, the
    configuration cannot be, or the calibration cannot be read.
    """

    def __init__(self, config: ArmConfig):
        self.config = config
        self._lock = threading.RLock()
        self._buffer = b""
        self._answers: dict[int, UserError | None] = {}
        self._requests = 0
        self._cycle: Cycle | None = None
        self._received = 0
        self.timing = LoopTiming()
        self.recording: str | None = None  # what became of the record, if not all is well
        self.ending: Ending | None = None
        self.info: DriverInfo | None = None
        configuration = config.to_json()
        self._socket, theirs = socket.socketpair()
        with theirs:
            # -P: the working directory must not shadow installed packages. A session of its own: Ctrl-C and
            # the end of the terminal reach this process, which then leaves the arm in order.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "vla.robot_drivers.arm_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._socket.settimeout(SEND_TIMEOUT)
        try:
            self._send(configuration)
            self._wait(lambda: self.info is not None, START_TIMEOUT, "describe its arm")
        except BaseException:
            self._hang_up()
            raise

    @property
    def pid(self) -> int:
        """The process that owns the arm."""
        return self._process.pid

    def open(self) -> Cycle:
        """Take the port, identify the arm, check its calibration. Nothing moves, torque stays as it is."""
        self._request("open")
        return self.latest()

    def enable(self) -> Cycle:
        """Take hold of the arm where it is: servo-side limits, goal := present, torque in steps."""
        self._request("enable")
        return self.latest()

    def setpoint(self, q: Mapping[str, float], within: float = 0.0) -> None:
        """Post where the joints shall go, by name; a heartbeat as well. Does not wait.

        They are led there on a straight line `within` so many seconds: give the time to the next setpoint,
        and the arm moves evenly. 0 asks for a step. A bad setpoint (unknown joints, not finite) is refused by
        the filter, and named in `Cycle.interventions`. Raises `ValueError` for a time that is none.
        """
        if not 0 <= within < math.inf:
            raise ValueError(f"a setpoint is due within 0 or more seconds, not {within!r}")
        try:
            content = json.loads(json.dumps(dict(q), default=float))
        except (TypeError, ValueError) as error:
            raise LimitViolation(f"The setpoint is not made of joint names and numbers ({error}).") from None
        with self._lock:
            self._tell({"op": "setpoint", "q": content, "time": time.monotonic(), "within": float(within)})

    def heartbeat(self) -> None:
        """Say that this process is well. `setpoint` and `latest` do, too."""
        with self._lock:
            self._tell({"op": "heartbeat"})

    def latest(self) -> Cycle:
        """Return the newest control period, at most two of them old; waits for one if need be.

        Before `open` there is none, and `ModeError` is raised. What it shows of the arm may be older:
        `Cycle.fresh` and `State.age` tell.
        """
        with self._lock:
            self.heartbeat()
            seen, period = self._received, 1 / (self.config.rate or self.info.control_rate)
            if self._cycle is None or time.monotonic() - self._cycle.time > 2 * period:
                self._request("look")  # answered behind every cycle that is still on its way
                if self._received == seen:
                    self._wait(lambda: self._received > seen, REQUEST_TIMEOUT, "do a control period")
            return self._cycle

    def hold(self) -> None:
        """Brake and stay there until the next setpoint (also after `rest`)."""
        self._request("hold")

    def rest(self) -> None:
        """Ramp to the rest pose and stay there, energised; setpoints are ignored until `hold`."""
        self._request("rest")

    def reset(self) -> None:
        """Acknowledge a latched fault, after which the arm can be enabled. Raises it if it persists."""
        self._request("reset")

    def release(self) -> None:
        """Switch torque off; an arm that falls must be at rest, else `ModeError`."""
        self._request("release")

    def emergency_stop(self) -> None:
        """Switch torque off now, wherever the arm is. It falls. Raises what could not be released."""
        self._request("emergency_stop")

    def close(self) -> Ending | None:
        """Leave the arm at rest, released and its port free; return how that went. Idempotent.

        None means that the other process was killed: servos that had torque hold their last goal. An
        interrupt (a second Ctrl-C) stops the waiting, not the arm's way to rest.
        """
        with self._lock:
            if self._socket.fileno() >= 0:
                try:
                    self._request("close", LEAVE_TIMEOUT)
                except ArmEnded:
                    pass
                finally:
                    self._hang_up()
        return self.ending

    def __enter__(self) -> Arm:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _hang_up(self) -> None:
        """Close the pipe, which ends the other process; wait for it if it has said so."""
        self._socket.close()
        if self.ending is not None or self.info is None:
            try:
                self._process.wait(timeout=START_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        else:
            self._process.poll()

    def _request(self, op: str, timeout: float = REQUEST_TIMEOUT) -> None:
        """Send one request and wait for its answer; raise what it raised there."""
        with self._lock:
            self._requests += 1
            number = self._requests
            self._tell({"op": op, "number": number})
            self._wait(lambda: number in self._answers, timeout, op)
            error = self._answers.pop(number)
        if error is not None:
            raise error

    def _tell(self, message: dict[str, Any]) -> None:
        """Send an operation, and how many cycles have been fetched: the other side stays a few ahead."""
        self._drain(0.0)
        self._send(json.dumps(message | {"seen": self._received}))

    def _send(self, line: str) -> None:
        try:
            self._socket.sendall(line.encode() + b"\n")
        except TimeoutError:
            raise DriverFault(f"The process that owns the arm ({self.pid}) takes no messages.") from None
        except OSError:
            self._drain(0.0)  # its last words say more than a broken pipe
            raise self._ended() from None

    def _wait(self, done, timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not done():
            if self.ending is not None and self.info is not None:
                raise self._ended()
            left = deadline - time.monotonic()
            if left <= 0:
                raise DriverFault(f"The arm's process ({self.pid}) did not {what} within {timeout:g} s.")
            self._drain(left)

    def _drain(self, timeout: float) -> None:
        """Take in everything that has arrived, waiting for the first of it."""
        while self._socket.fileno() >= 0 and select.select([self._socket], [], [], timeout)[0]:
            try:
                data = self._socket.recv(1 << 16)
            except ConnectionError:
                data = b""
            if not data:
                raise self._ended()
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
            timeout = 0.0

    def _take(self, message: dict[str, Any]) -> None:
        """Keep what one message says."""
        if "cycle" in message:
            self._cycle, self._received = cycle_from_json(message["cycle"]), self._received + 1
            self.recording = message["recording"]
        if "timing" in message:
            self.timing = LoopTiming(**message["timing"])
        if "answer" in message:
            self._answers[message["answer"]] = fault_from_json(message["error"])
        if "info" in message:
            self.info = info_from_json(message["info"])
        if "ending" in message:
            ending = message["ending"]
            self.ending = Ending(**ending | {"unreleased": tuple(ending["unreleased"])})
        if "refused" in message:
            raise fault_from_json(message["refused"])

    def _ended(self) -> ArmEnded:
        if self.ending is not None:
            return ArmEnded(self.ending.sentence, self.ending)
        return ArmEnded(
            f"The process that owned the arm ({self.pid}) was killed. Servos that had torque hold their last"
            " goal: connect again to take the arm over, or support it and switch the motor supply off.",
            None,
        )

"""The process that owns an arm: its loop keeps the rate, whatever the program that steers it does.

Run by `arm.Arm` as ``python -m vla.robot_drivers.arm_process FD``, where FD is one end of a socket pair. Both
sides write JSON lines: the client its configuration, then operations; this side a description of the arm,
answers, and every control period. Nothing here waits for the client: a cycle that it does not fetch is
dropped, and the end of the pipe, too long a silence, or a signal leaves the arm as `ending.leave` says.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from vla.errors import UserError

from .arm import ArmConfig, LoopTiming
from .driver import RobotDriver
from .ending import Ending, leave
from .faults import DriverFault
from .recorder import Recorder
from .supervisor import ENERGISED, Cycle, Mode, ModeError, Supervisor, SupervisorConfig
from .wire import cycle_to_json, fault_to_json, info_to_json

DRIVERS = {
    "so101": "vla.robot_drivers.so101.driver:make_so101",
    "lerobot": "vla.robot_drivers.adapters.lerobot_robot:make_lerobot",
    "trossen": "vla.robot_drivers.adapters.trossen:make_trossen",
}
"""Factories of drivers by short name."""

WINDOW = 500
"""Cycles over which the loop's regularity is judged."""

IDLE = 0.1
"""Seconds between looks at signals while there is no loop to keep."""

AHEAD = 32
"""Cycles that may wait to be fetched before the next ones are dropped, so that the last words still fit."""

REQUESTS = ("open", "enable", "hold", "rest", "reset", "release", "emergency_stop", "look", "close")


class Pacer:
    """Absolute deadlines: a late cycle does not delay the next one, and periods gone by are counted."""

    def __init__(self, period: float):
        self.period = period
        self.cycles = self.missed = 0
        self._begins: deque[float] = deque(maxlen=WINDOW)
        self._works: deque[float] = deque(maxlen=WINDOW)
        self.deadline = time.monotonic()

    def finish(self, begin: float) -> None:
        """Note a cycle that began at `begin` and has just ended; set the next deadline."""
        now = time.monotonic()
        self._begins.append(begin)
        self._works.append(now - begin)
        self.cycles += 1
        self.deadline += self.period
        if now > self.deadline:
            late = int((now - self.deadline) // self.period) + 1
            self.missed += late
            self.deadline += late * self.period

    def forgive(self) -> None:
        """Start anew after something that may take longer than a period."""
        self.deadline = time.monotonic()

    def timing(self) -> LoopTiming:
        """Return the statistics of the window."""
        if len(self._begins) < 2:
            return LoopTiming(self.cycles, self.missed)
        periods, works = 1e3 * np.diff(self._begins), 1e3 * np.array(self._works)
        return LoopTiming(
            cycles=self.cycles,
            missed=self.missed,
            window=len(periods),
            rate=float(1e3 / periods.mean()),
            period_p50=float(np.percentile(periods, 50)),
            period_p99=float(np.percentile(periods, 99)),
            period_max=float(periods.max()),
            work_p50=float(np.percentile(works, 50)),
            work_p99=float(np.percentile(works, 99)),
        )


class Pipe:
    """JSON lines to and from the client. Sending never waits: cycles that nobody fetches are dropped."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self._published = self._seen = 0
        self._incoming = b""
        self._outgoing = b""

    def receive(self, timeout: float) -> list[dict[str, Any]] | None:
        """Return the messages that arrive within `timeout` (s), waiting for the first; None at the end."""
        ready, _, _ = select.select([self.connection], [], [], max(timeout, 0.0))
        if not ready:
            return []
        try:
            data = self.connection.recv(1 << 16)
        except ConnectionError:
            data = b""
        if not data:
            return None
        *lines, self._incoming = (self._incoming + data).split(b"\n")
        messages = [json.loads(line) for line in lines]
        self._seen = max([self._seen, *(message.get("seen", 0) for message in messages)])
        return messages

    def publish(self, message: dict[str, Any]) -> None:
        """Send a control period; drop it if the client does not fetch them."""
        if self._push() and self._published - self._seen < AHEAD:
            self._published += 1
            self.say(message)

    def say(self, message: dict[str, Any]) -> None:
        """Send a message that must not be lost."""
        self._outgoing += json.dumps(message).encode() + b"\n"
        self._push()

    def finish(self, seconds: float) -> None:
        """Give the client up to `seconds` to fetch the last words."""
        until = time.monotonic() + seconds
        while not self._push() and time.monotonic() < until:
            select.select([], [self.connection], [], IDLE)

    def _push(self) -> bool:
        """Send what is pending; return whether nothing is left."""
        if self._outgoing:
            try:
                sent = self.connection.send(self._outgoing, socket.MSG_DONTWAIT)
                self._outgoing = self._outgoing[sent:]
            except BlockingIOError:
                pass
            except ConnectionError:  # the client is gone; `receive` will say so
                self._outgoing = b""
        return not self._outgoing


class ArmProcess:
    """The loop: what the client asks for, one control period, what the client is told."""

    def __init__(self, pipe: Pipe, config: ArmConfig):
        self.pipe, self.config = pipe, config
        driver = make_driver(config)
        self.supervisor = Supervisor(
            driver,
            rest_pose(config, driver),
            config.safety_filter(driver.info),
            config.supervisor,
        )
        self.pacer = Pacer(1 / (config.rate or driver.info.control_rate))
        self.recorder = None if config.record is None else Recorder(config.record, driver.info)
        self.heard = time.monotonic()
        self.reason: str | None = None
        self.closing: int | None = None  # the number of the client's own request to close
        self.parent = os.getppid()

    def run(self) -> Ending:
        """Serve until there is a reason to stop, then leave the arm."""
        self.pipe.say({"info": info_to_json(self.supervisor.driver.info)})
        try:
            while self.reason is None:
                self._listen()
                if self.reason is None and self.supervisor.mode is not Mode.OFF:
                    self._cycle()
        finally:  # also if a bug ends the loop: the arm must not pay for it
            reason = self.reason or "The arm's process failed."
            ending = leave(self.supervisor, reason, sleep=self._sleep, on_cycle=self._tell)
            if self.recorder is not None:
                self.recorder.close()
        self._report(ending)
        return ending

    def stop(self, signum: int, frame: object) -> None:
        """End because a signal says so."""
        self.reason = f"The arm's process received {signal.Signals(signum).name}."

    def _report(self, ending: Ending) -> None:
        self.pipe.say({"ending": asdict(ending)})
        if self.closing is not None:
            self.pipe.say({"answer": self.closing, "error": None})
        self.pipe.finish(1.0)

    def _listen(self) -> None:
        """Hear the client until the next cycle is due."""
        while self.reason is None:
            running = self.supervisor.mode is not Mode.OFF
            left = self.pacer.deadline - time.monotonic() if running else IDLE
            messages = self.pipe.receive(left)
            # A child of the client may hold the pipe open beyond its end, so its life is watched as well.
            if messages is None or os.getppid() != self.parent:
                self.reason = "The program that steered the arm has ended."
                return
            if messages:
                self.heard = time.monotonic()
            for message in messages:
                self._obey(message)
            silent = time.monotonic() - self.heard
            if silent > self.config.heartbeat_timeout and self.supervisor.mode in ENERGISED:
                self.reason = f"The program that steered the arm was silent for {silent:.1f} s."
            if left <= 0 or not messages:
                return

    def _obey(self, message: dict[str, Any]) -> None:
        """Carry out one operation; a request is answered with what it raised."""
        op, number = message["op"], message.get("number")
        if op == "setpoint":
            self.supervisor.setpoint(message["q"], message["time"], message["within"])
        elif op == "close":
            self.reason, self.closing = "The program that steered the arm closed it.", number
        elif op in REQUESTS:
            error = None
            try:
                self._carry_out(op)
            except UserError as raised:
                error = fault_to_json(raised)
            if op not in ("hold", "rest", "look"):
                self.pacer.forgive()
            self.heard = time.monotonic()  # it was waiting for this
            self.pipe.say({"answer": number, "error": error})

    def _sleep(self, seconds: float) -> None:
        """Wait while the arm is being left; of all that the client says, the emergency stop still counts."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            messages = self.pipe.receive(left)
            if messages is None:
                time.sleep(left)
                return
            for message in messages:
                if message["op"] == "emergency_stop":
                    self._obey(message)
                elif "number" in message:
                    error = ModeError(f"The arm is being left. {self.reason}")
                    self.pipe.say({"answer": message["number"], "error": fault_to_json(error)})

    def _carry_out(self, op: str) -> None:
        supervisor, now = self.supervisor, time.monotonic()
        if op == "look":
            if supervisor.mode is Mode.OFF:
                raise ModeError(f"'{supervisor.driver.info.name}' is off: open it first.")
        elif op in ("enable", "rest"):
            getattr(supervisor, op)(now)
        else:
            failed = getattr(supervisor, op)()
            if failed:  # of release and emergency_stop
                raise DriverFault(" ".join(map(str, failed)))

    def _cycle(self) -> None:
        begin = time.monotonic()
        self._tell(self.supervisor.cycle(begin))
        self.pacer.finish(begin)

    def _tell(self, cycle: Cycle) -> None:
        """Record a control period and pass it on."""
        content = cycle_to_json(cycle)
        message: dict[str, Any] = {"cycle": content, "recording": None}
        if self.recorder is not None:
            self.recorder.add(content)
            message["recording"] = self.recorder.trouble
        if self.pacer.cycles % 25 == 0:
            message["timing"] = asdict(self.pacer.timing())
        self.pipe.publish(message)


def make_driver(config: ArmConfig) -> RobotDriver:
    """Return the driver that `config` names. Raises `UserError` if there is none, or it refuses."""
    path = DRIVERS.get(config.driver, config.driver)
    module, _, name = path.partition(":")
    try:
        factory: Callable[..., RobotDriver] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"There is no driver '{config.driver}' ({error}): give one of {', '.join(DRIVERS)}, or"
            " 'package.module:function'."
        ) from None
    try:
        return factory(**config.arguments)
    except TypeError as error:
        raise UserError(f"The driver '{config.driver}' does not take its arguments: {error}.") from None


def rest_pose(config: ArmConfig, driver: RobotDriver) -> np.ndarray:
    """Return the pose (J,) in which the arm may be released."""
    info = driver.info
    if config.rest is not None:
        if set(config.rest) != set(info.joint_names):
            raise UserError(
                f"The rest pose has joints {sorted(config.rest)}, the arm {sorted(info.joint_names)}."
            )
        return np.array([config.rest[name] for name in info.joint_names], float)
    if info.rest is None:
        raise UserError(f"'{info.name}' has no rest pose of its own: give one.")
    return np.array(info.rest)


def read_config(content: dict[str, Any]) -> ArmConfig:
    """Return what `ArmConfig.to_json` wrote."""
    return ArmConfig(**content | {"supervisor": SupervisorConfig(**content["supervisor"])})


def main(descriptor: int) -> None:
    """Serve the client at the other end of the socket `descriptor`."""
    with contextlib.suppress(PermissionError):
        os.nice(-10)  # the arm before everything else, where that is allowed
    pipe = Pipe(socket.socket(fileno=descriptor))
    messages: list[dict[str, Any]] | None = []
    while not messages:
        messages = pipe.receive(IDLE)
        if messages is None:
            return
    try:
        process = ArmProcess(pipe, read_config(messages[0]))
    except UserError as error:
        pipe.say({"refused": fault_to_json(error)})
        pipe.finish(1.0)
        return
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, process.stop)
    gc.collect()
    gc.freeze()  # what is loaded by now stays: looking through it again would delay a cycle by milliseconds
    process.run()


if __name__ == "__main__":
    main(int(sys.argv[1]))

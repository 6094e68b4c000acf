"""The serial bus of an SO101: one owner, one transaction at a time, every one bounded in time.

What keeps an old reply from being taken for a new one, which half-duplex Feetech packets cannot tell apart:
the input is flushed before every transmit; a reply counts only with the right sender *and* length; and
whatever is read is read with a length that changes from one transaction to the next, so that a reply to one
of the last three has the wrong one. Acknowledgements of writes carry nothing that could tell them apart:
what must be certain is read back.

Nothing but `DriverFault` leaves this module: a vanished adapter is `Disconnected` whatever the operating
system calls it, silence is `BusTimeout`, noise `BusCorrupt`, and silence of `dead_after` seconds
`Disconnected`.
"""

from __future__ import annotations

import contextlib
import select
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import serial

from ..faults import BusCorrupt, BusTimeout, Disconnected, DriverFault
from ..serial_port import why_not_open
from . import codec
from . import registers as r
from .codec import Packet, PacketReader

BLOCK = range(r.TORQUE_ENABLE.address, r.PRESENT_CURRENT.address + r.PRESENT_CURRENT.size)
"""Addresses of the status block: torque and goal, so that a servo that rebooted shows, to the current."""

TAGS = 4
"""Replies of this many lengths take turns."""

LONGEST_REGISTER = 2  # bytes

FEWEST_FAILURES = 3
"""Failed cycles in a row before a bus is called dead: one long pause of the caller is not enough."""

TRIES = 5
"""Attempts at a transaction outside the control loop, where a lost reply is not worth a failure."""

GONE = (OSError, termios.error)  # serial.SerialException is an OSError, termios.error is not


def patient(transact: Callable, *arguments):
    """Repeat a transaction whose reply was lost or damaged."""
    for _ in range(TRIES - 1):
        try:
            return transact(*arguments)
        except (BusTimeout, BusCorrupt):
            continue
    return transact(*arguments)


@dataclass(frozen=True)
class ServoStatus:
    """One servo's status block, in the servo's units: steps, steps/s, 0.1 %; V, °C, A.

    `conditions` are `registers.Condition` bits. `torque` is the value of ``TORQUE_ENABLE``.
    """

    torque: int
    goal: int
    position: int
    velocity: int
    load: int
    voltage: float
    temperature: int
    conditions: int
    current: float

    @classmethod
    def parse(cls, block: bytes, error: int) -> ServoStatus:
        """Read the bytes of `BLOCK` (longer is fine) and the reply's error byte."""

        def get(register: r.Register) -> int:
            start = register.address - BLOCK.start
            return register.unpack(block[start : start + register.size])

        return cls(
            torque=get(r.TORQUE_ENABLE),
            goal=get(r.GOAL_POSITION),
            position=get(r.PRESENT_POSITION),
            velocity=get(r.PRESENT_VELOCITY),
            load=get(r.PRESENT_LOAD),
            voltage=get(r.PRESENT_VOLTAGE) / 10,
            temperature=get(r.PRESENT_TEMPERATURE),
            conditions=get(r.STATUS) | error,
            current=get(r.PRESENT_CURRENT) * 0.0065,
        )


class FeetechBus:
    """Named servos on a serial port. Not thread-safe: one thread owns it.

    `joints` maps names to servo ids. A transaction takes at most `reply_timeout` (s) beyond its time on the
    wire. `dead_after` (s) without a whole status block makes the bus `Disconnected`.
    """

    def __init__(
        self,
        port: str,
        joints: Mapping[str, int],
        *,
        baudrate: int = 1_000_000,
        reply_timeout: float = 0.02,
        dead_after: float = 0.5,
    ):
        self.port, self.joints = port, dict(joints)
        self.baudrate, self.reply_timeout, self.dead_after = baudrate, reply_timeout, dead_after
        self._names = {id: name for name, id in self.joints.items()}
        self._serial: serial.Serial | None = None
        self._echo = False
        self._turn = 0
        self._failures, self._last_good = 0, 0.0

    @property
    def is_open(self) -> bool:
        """Whether the port is held."""
        return self._serial is not None

    def open(self) -> None:
        """Take the port for this process alone. Moves nothing. Raises `Disconnected`."""
        if self._serial is not None:
            return
        try:
            self._serial = serial.Serial(
                self.port, self.baudrate, timeout=0, write_timeout=self.reply_timeout + 0.1, exclusive=True
            )
        except (*GONE, ValueError) as error:
            raise Disconnected(why_not_open(self.port, error)) from None
        self._failures, self._last_good = 0, time.monotonic()
        try:
            self._echo = self._hears_itself()
        except DriverFault:
            self.close()
            raise

    def close(self) -> None:
        """Give the port back. Idempotent, never raises, sends nothing."""
        port, self._serial = self._serial, None
        if port is not None:
            with contextlib.suppress(*GONE):
                port.close()

    def ping(self, joint: str) -> int:
        """Return the joint's `Condition` bits."""
        return self._single(joint, codec.ping(self.joints[joint]), 0).code

    def read(self, joint: str, register: r.Register) -> int:
        """Return the value of one register."""
        length = LONGEST_REGISTER + self._tag()
        command = codec.read(self.joints[joint], register.address, length)
        return register.unpack(self._single(joint, command, length).parameters[: register.size])

    def write(self, joint: str, register: r.Register, value: int) -> int:
        """Write one register and wait until it is acknowledged; return the joint's `Condition` bits.

        An error bit in the acknowledgement does not mean that the write failed.
        """
        command = codec.write(self.joints[joint], register.address, register.pack(value))
        return self._single(joint, command, 0).code

    def write_goals(self, goals: Mapping[str, int]) -> None:
        """Send goal positions (steps) to several joints at once. Not acknowledged."""
        data = {self.joints[name]: r.GOAL_POSITION.pack(goal) for name, goal in goals.items()}
        self._exchange(codec.sync_write(r.GOAL_POSITION.address, data), {})

    def status(self) -> dict[str, ServoStatus]:
        """Return the status block of every joint, all asked for now.

        Raises `BusTimeout` or `BusCorrupt` for a cycle that failed, and `Disconnected` once no cycle has
        succeeded for `dead_after` seconds.
        """
        length = len(BLOCK) + self._tag()
        ids = list(self.joints.values())
        try:
            replies = self._exchange(codec.sync_read(ids, BLOCK.start, length), dict.fromkeys(ids, length))
        except (BusTimeout, BusCorrupt) as fault:
            self._failures += 1
            silent = time.monotonic() - self._last_good
            if self._failures >= FEWEST_FAILURES and silent > self.dead_after:
                raise Disconnected(f"No answer for {silent:.2f} s. {fault}") from None
            raise
        self._failures, self._last_good = 0, time.monotonic()
        return {self._names[id]: ServoStatus.parse(it.parameters, it.code) for id, it in replies.items()}

    def _tag(self) -> int:
        """Return by how many bytes this read is longer than it need be, 0 to `TAGS` − 1 in turn."""
        self._turn = (self._turn + 1) % TAGS
        return self._turn

    def _single(self, joint: str, command: Packet, parameters: int) -> Packet:
        reply = self._exchange(command, {command.id: parameters})[self.joints[joint]]
        self._last_good = time.monotonic()
        return reply

    def _exchange(self, command: Packet, expected: Mapping[int, int]) -> dict[int, Packet]:
        """Send a command and return its replies. `expected` maps ids to numbers of parameter bytes."""
        wire = command.encode()
        with self._held_port() as port:
            port.reset_input_buffer()
            port.write(wire)
            if not expected:
                return {}
            size = len(wire) + sum(map(codec.reply_size, expected.values()))
            allowed = self.reply_timeout + 10 * size / self.baudrate
            return self._collect(port, wire, expected, allowed)

    def _collect(
        self, port: serial.Serial, wire: bytes, expected: Mapping[int, int], allowed: float
    ) -> dict[int, Packet]:
        """Read until every expected reply is there, or raise after `allowed` seconds."""
        deadline = time.monotonic() + allowed
        reader, foreign = PacketReader(longest=max(expected.values())), 0
        echo = len(wire) if self._echo else 0
        found: dict[int, Packet] = {}
        while len(found) < len(expected):
            data = self._receive(port, deadline)
            if data is None:
                missing = [id for id in expected if id not in found]
                raise self._failure(missing, allowed, bool(reader.skipped + reader.pending + foreign))
            echo, data = max(echo - len(data), 0), data[echo:]
            for packet in reader.feed(data):
                if expected.get(packet.id) == len(packet.parameters) and packet.id not in found:
                    found[packet.id] = packet
                else:
                    foreign += 1
        return {id: found[id] for id in expected}

    @staticmethod
    def _receive(port: serial.Serial, deadline: float) -> bytes | None:
        """Return what has arrived, waiting for it until `deadline`; None if nothing has."""
        ready, _, _ = select.select([port.fileno()], [], [], max(deadline - time.monotonic(), 0.0))
        return port.read(4096) if ready else None

    def _failure(self, missing: Sequence[int], allowed: float, noise: bool) -> DriverFault:
        names = [self._names[id] for id in missing]
        who = ", ".join(f"'{name}' (servo {id})" for name, id in zip(names, missing, strict=True))
        if noise:
            return BusCorrupt(
                names,
                f"The replies of {who} were damaged or not the expected ones. Check the plugs, and that no"
                " two servos have the same id.",
            )
        return BusTimeout(
            names,
            f"No reply from {who} within {1e3 * allowed:.0f} ms. Check the motor supply and the cable that"
            f" leads to servo {missing[0]}.",
        )

    def _hears_itself(self) -> bool:
        """Return whether the adapter repeats what is sent (its transmit and receive lines are joined).

        Asks a servo for its model: the answer differs from the question, so only an echo equals it. Waits for
        the answer too, so that it does not meet the first transaction.
        """
        wire = codec.read(next(iter(self.joints.values())), r.MODEL_NUMBER.address, 2).encode()
        answer = codec.reply_size(2)
        with self._held_port() as port:
            port.reset_input_buffer()
            port.write(wire)
            deadline, heard = time.monotonic() + self.reply_timeout, b""
            while len(heard) < answer + len(wire) * heard.startswith(wire):
                data = self._receive(port, deadline)
                if data is None:
                    break
                heard += data
        return heard.startswith(wire)

    @contextlib.contextmanager
    def _held_port(self) -> Iterator[serial.Serial]:
        """Yield the port; turn whatever a vanished adapter raises into `Disconnected`, and close it."""
        if self._serial is None:
            raise Disconnected(f"The serial port {self.port} is not open.")
        try:
            yield self._serial
        except serial.SerialTimeoutException:
            raise BusTimeout(list(self.joints), f"The adapter at {self.port} takes no data.") from None
        except GONE as error:
            self.close()
            raise Disconnected(
                f"The adapter at {self.port} has vanished ({error}). The servos hold their last goal; plug it"
                " in and connect again."
            ) from None

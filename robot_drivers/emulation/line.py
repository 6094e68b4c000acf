"""The emulated bus: which servo answers what, and what goes wrong with the answers on demand."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from ..so101 import registers as r
from ..so101.codec import BROADCAST, Instruction, Packet
from .servo import EmulatedServo

STEP = 0.004
"""Seconds of the world between two looks of the servos at their tables."""

Kind = Literal["drop", "corrupt", "delay", "short", "noise", "lose_byte", "flip"]
KINDS = ("drop", "corrupt", "delay", "short", "noise", "lose_byte", "flip")


@dataclass
class Injection:
    """What happens to the next `count` replies (-1: to all) of `servo` (None: any) to `instruction`.

    ``drop`` loses the reply, ``corrupt`` damages its checksum, ``delay`` sends it `seconds` late, ``short``
    sends one parameter byte less in a valid packet, ``noise`` puts garbage before it, ``lose_byte`` omits
    one byte, ``flip`` turns one bit of the packet over. Each reply is hit with `probability`; one that is not
    does not count.
    """

    kind: Kind
    servo: int | None = None
    instruction: int | None = None
    count: int = 1
    seconds: float = 0.0
    probability: float = 1.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}, one of {', '.join(KINDS)}")

    def hits(self, servo: int, instruction: int, rng: random.Random) -> bool:
        """Return whether this reply is hit, and count it if so."""
        if self.count == 0 or self.servo not in (None, servo) or self.instruction not in (None, instruction):
            return False
        if rng.random() >= self.probability:
            return False
        self.count -= self.count > 0
        return True


@dataclass(frozen=True)
class Reply:
    """Bytes for the wire, `late` seconds after their turn."""

    wire: bytes
    late: float = 0.0


class World(Protocol):
    """What the servos move, where they do not just move."""

    servos: list[EmulatedServo]

    def tick(self, dt: float) -> None:
        """Let `dt` seconds pass for the servos and all that they move."""


class EmulatedLine:
    """Servos on one bus. `echo` repeats every command to the sender, `mute` loses all that is sent back.

    With a `world` the servos are its, and it says how they move.
    """

    def __init__(self, servos: Iterable[EmulatedServo] = (), seed: int = 0, world: World | None = None):
        self.world = world
        self.servos = {servo.id: servo for servo in (world.servos if world else servos)}
        self.injections: list[Injection] = []
        self.trace: deque[Packet] = deque(maxlen=4096)
        self.echo = self.mute = False
        self._rng = random.Random(seed)

    def tick(self, dt: float) -> None:
        """Let `dt` seconds pass for every servo."""
        if self.world is not None:
            self.world.tick(dt)
            return
        for servo in self.servos.values():
            servo.tick(dt)

    def advance(self, seconds: float) -> None:
        """Let time pass in equal steps of about `STEP`."""
        steps = max(1, round(seconds / STEP))
        for _ in range(steps):
            self.tick(seconds / steps)

    def answer(self, command: Packet, baudrate: int) -> list[Reply]:
        """Carry out a command that arrived at `baudrate`, and return the replies in their order."""
        self.trace.append(command)
        heard = [
            servo
            for servo in self.servos.values()
            if servo.connected and servo.powered and r.BAUD_RATES[servo.get(r.BAUD_RATE)] == baudrate
        ]
        answers = list(self._answers(command, {servo.id: servo for servo in heard}))
        self.servos = {servo.id: servo for servo in self.servos.values()}  # an id may have been written
        replies = [Reply(command.encode())] if self.echo else []
        for servo, data in answers:
            packet = Packet(servo.id, int(servo.status()), data)
            replies += self._damage(packet, command.code)
        return [] if self.mute else replies

    def _answers(self, command: Packet, heard: dict[int, EmulatedServo]):
        """Carry out a command; yield (servo, parameters) per reply."""
        addressed = list(heard.values()) if command.id == BROADCAST else [heard.get(command.id)]
        addressed = [servo for servo in addressed if servo is not None]
        p = command.parameters
        match command.code:
            case Instruction.PING:
                yield from ((servo, b"") for servo in addressed)
            case Instruction.READ if len(p) == 2:
                yield from ((servo, servo.read(*p)) for servo in addressed if command.id != BROADCAST)
            case Instruction.WRITE | Instruction.REG_WRITE if len(p) >= 2:
                for servo in addressed:
                    later = command.code == Instruction.REG_WRITE
                    (servo.write_later if later else servo.write)(p[0], p[1:])
                    if command.id != BROADCAST and servo.get(r.RESPONSE_STATUS_LEVEL):
                        yield servo, b""
            case Instruction.ACTION:
                for servo in addressed:
                    servo.act()
            case Instruction.SYNC_READ if len(p) > 2:
                yield from ((heard[id], heard[id].read(p[0], p[1])) for id in p[2:] if id in heard)
            case Instruction.SYNC_WRITE if len(p) > 2 and (len(p) - 2) % (p[1] + 1) == 0:
                for i in range(2, len(p), p[1] + 1):
                    if p[i] in heard:
                        heard[p[i]].write(p[0], p[i + 1 : i + 1 + p[1]])

    def _damage(self, packet: Packet, instruction: int) -> list[Reply]:
        """Return the reply after every injection that hits it."""
        late = 0.0
        prefix, lost, kinds = b"", None, []
        for injection in self.injections:
            if injection.hits(packet.id, instruction, self._rng):
                kinds.append(injection.kind)
                late += injection.seconds if injection.kind == "delay" else 0.0
        self.injections = [injection for injection in self.injections if injection.count]
        if "drop" in kinds:
            return []
        if "short" in kinds:
            packet = Packet(packet.id, packet.code, packet.parameters[:-1])
        wire = bytearray(packet.encode())
        if "corrupt" in kinds:
            wire[-1] ^= 0x5A
        if "noise" in kinds:
            prefix = bytes([0xFF, 0xFF, 0x07, 0x00, 0xFF])
        if "flip" in kinds:
            wire[self._rng.randrange(len(wire))] ^= 1 << self._rng.randrange(8)
        if "lose_byte" in kinds:
            lost = self._rng.randrange(len(wire))
            del wire[lost]
        return [Reply(prefix + bytes(wire), late)]


def is_goal(command: Packet) -> bool:
    """Return whether the command is a SYNC_WRITE of goal positions: the beat of the lockstep world."""
    if command.code != Instruction.SYNC_WRITE or len(command.parameters) < 2:
        return False
    address, length = command.parameters[:2]
    return address <= r.GOAL_POSITION.address < address + length


def wire_time(size: int, baudrate: int) -> float:
    """Seconds that `size` bytes occupy the line: ten bits each."""
    return 10 * size / baudrate

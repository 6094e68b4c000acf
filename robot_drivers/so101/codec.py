"""Feetech packets: how a command and its replies look on the wire.

    command   FF FF  id  length  instruction  parameters…  checksum
    reply     FF FF  id  length  error        parameters…  checksum

``length`` counts what follows it: parameters + 2. The checksum is the complement of the sum of everything
between header and checksum, modulo 256. Nothing escapes FF inside a packet, so FF FF may also be data: a
reader resynchronises by checksum, not by header alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

HEADER = b"\xff\xff"
BROADCAST = 0xFE
LONGEST_PARAMETERS = 250
SHORTEST_PACKET = 6


class Instruction(IntEnum):
    """What a command asks for."""

    PING = 0x01
    READ = 0x02
    WRITE = 0x03
    REG_WRITE = 0x04
    ACTION = 0x05
    SYNC_READ = 0x82
    SYNC_WRITE = 0x83


@dataclass(frozen=True)
class Packet:
    """A command (`code` is its `Instruction`) or a reply (`code` is its error byte)."""

    id: int
    code: int
    parameters: bytes = b""

    def encode(self) -> bytes:
        """Return the packet as it goes over the wire. Raises `ValueError` for what no packet can hold."""
        if not 0 <= self.id <= BROADCAST:
            raise ValueError(f"servo id {self.id} is not in 0..254")
        if len(self.parameters) > LONGEST_PARAMETERS:
            raise ValueError(f"{len(self.parameters)} parameter bytes, a packet holds {LONGEST_PARAMETERS}")
        body = bytes([self.id, len(self.parameters) + 2, self.code]) + self.parameters
        return HEADER + body + bytes([checksum(body)])


def checksum(body: bytes) -> int:
    """Return ~Σ body mod 256, where `body` is everything between header and checksum."""
    return ~sum(body) & 0xFF


def ping(id: int) -> Packet:
    """Ask servo `id` for its status."""
    return Packet(id, Instruction.PING)


def read(id: int, address: int, length: int) -> Packet:
    """Ask servo `id` for `length` bytes from `address`."""
    return Packet(id, Instruction.READ, bytes([address, length]))


def write(id: int, address: int, data: bytes) -> Packet:
    """Write `data` at `address`; id 254 reaches every servo and is not answered."""
    return Packet(id, Instruction.WRITE, bytes([address]) + data)


def sync_read(ids: Sequence[int], address: int, length: int) -> Packet:
    """Ask all `ids` for `length` bytes from `address`; they answer one after the other, in this order."""
    return Packet(BROADCAST, Instruction.SYNC_READ, bytes([address, length, *ids]))


def sync_write(address: int, data: Mapping[int, bytes]) -> Packet:
    """Write `data[id]`, all of one length, at `address` of every servo in it. Nobody answers."""
    (length,) = {len(part) for part in data.values()}
    parameters = bytes([address, length])
    for id, part in data.items():
        parameters += bytes([id]) + part
    return Packet(BROADCAST, Instruction.SYNC_WRITE, parameters)


def reply_size(parameters: int) -> int:
    """Bytes on the wire of a reply with that many parameter bytes."""
    return SHORTEST_PACKET + parameters


class PacketReader:
    """Turns a stream of bytes, however it is cut, into packets; skips everything else.

    `longest` is the largest number of parameters to expect: a damaged length byte beyond it is noise at once
    instead of a wait for bytes that never come. `skipped` counts the bytes that were part of no packet.
    """

    def __init__(self, longest: int = LONGEST_PARAMETERS):
        self.longest = longest
        self.skipped = 0
        self._buffer = bytearray()

    @property
    def pending(self) -> int:
        """Bytes that may still become a packet."""
        return len(self._buffer)

    def clear(self) -> None:
        """Forget what is pending."""
        self._buffer.clear()

    def feed(self, data: bytes) -> list[Packet]:
        """Take in `data` and return the packets that are complete now."""
        self._buffer += data
        packets = []
        while self._synchronise() and (size := self._buffer[3] + 4) <= len(self._buffer):
            body = bytes(self._buffer[2 : size - 1])
            if checksum(body) != self._buffer[size - 1]:
                self._skip(1)  # the header may have been data: a packet can begin inside the damaged one
                continue
            packets.append(Packet(body[0], body[2], body[3:]))
            del self._buffer[:size]
        return packets

    def _synchronise(self) -> bool:
        """Skip to the first possible header. Returns whether id and length are there to be judged."""
        while True:
            start = self._buffer.find(HEADER)
            if start < 0:
                self._skip(len(self._buffer) - self._buffer.endswith(b"\xff"))
                return False
            self._skip(start)
            if len(self._buffer) < 4:
                return False
            # A third FF is never an id: the header begins one byte later.
            if self._buffer[2] <= BROADCAST and 2 <= self._buffer[3] <= self.longest + 2:
                return True
            self._skip(1)

    def _skip(self, count: int) -> None:
        self.skipped += count
        del self._buffer[:count]

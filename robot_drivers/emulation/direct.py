"""The bus without a line: the same packets, answered in this process.

For training and evaluating in simulation, where a pseudo-terminal would only cost time: everything between
a setpoint and a sample is the code that drives the arm, down to the bytes of a packet, only without a wire.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..faults import BusTimeout
from ..so101.bus import FeetechBus
from ..so101.calibration import Calibration
from ..so101.codec import Packet, PacketReader
from ..so101.driver import So101Driver
from .line import EmulatedLine, is_goal


class DirectBus(FeetechBus):
    """The bus of `line`, in lockstep: each SYNC_WRITE of goals lets `period` (s) pass."""

    def __init__(self, line: EmulatedLine, joints: Mapping[str, int], period: float):
        super().__init__("(no line)", joints)
        self.line, self.period = line, period

    @property
    def is_open(self) -> bool:
        """There is nothing to hold."""
        return True

    def open(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""

    def _exchange(self, command: Packet, expected: Mapping[int, int]) -> dict[int, Packet]:
        reader = PacketReader(longest=max(expected.values(), default=0))
        replies = self.line.answer(command, self.baudrate)
        packets = reader.feed(b"".join(reply.wire for reply in replies))
        if is_goal(command):
            self.line.advance(self.period)
        found = {packet.id: packet for packet in packets if len(packet.parameters) == expected.get(packet.id)}
        missing = [self._names[id] for id in expected if id not in found]
        if missing:
            raise BusTimeout(missing, f"No reply from {', '.join(missing)}.")
        return {id: found[id] for id in expected}


def direct_driver(line: EmulatedLine, calibration: Calibration, period: float, clock) -> So101Driver:
    """Return the SO101's driver on the servos of `line`; `clock` is the world's (s)."""
    driver = So101Driver("(no line)", calibration, clock=clock)
    driver.bus = DirectBus(line, driver.bus.joints, period)
    return driver

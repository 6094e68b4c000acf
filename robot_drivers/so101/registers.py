"""The STS3215's memory table: what lives at which address, how it is encoded, and what its bits mean.

Addresses, widths and encodings are those of Feetech's public memory table (STS/SMS series). Words are
little-endian. Signed registers are sign-magnitude: one bit says negative, the bits below it how much.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

MODEL_STS3215 = 777
STEPS_PER_TURN = 4096
EEPROM = range(0, 40)
"""Addresses kept without power, once ``Lock`` is 0; the rest is volatile."""


@dataclass(frozen=True)
class Register:
    """`size` bytes at `address`; `sign_bit` is the bit that means negative, None if unsigned."""

    address: int
    size: int = 1
    sign_bit: int | None = None

    @property
    def span(self) -> slice:
        """Where the register lies in the table."""
        return slice(self.address, self.address + self.size)

    def pack(self, value: int) -> bytes:
        """Return `value` as the register's bytes. Raises `ValueError` if it does not fit."""
        magnitude_bits = 8 * self.size if self.sign_bit is None else self.sign_bit
        if (self.sign_bit is None and value < 0) or abs(value) >= 1 << magnitude_bits:
            raise ValueError(f"{value} does not fit the register at address {self.address}")
        raw = value if value >= 0 else -value | 1 << self.sign_bit
        return raw.to_bytes(self.size, "little")

    def unpack(self, data: bytes) -> int:
        """Return the value of the register's `size` bytes."""
        if len(data) != self.size:
            raise ValueError(f"the register at address {self.address} has {self.size} bytes, got {len(data)}")
        raw = int.from_bytes(data, "little")
        if self.sign_bit is None:
            return raw
        magnitude = raw & ((1 << self.sign_bit) - 1)
        return -magnitude if raw >> self.sign_bit & 1 else magnitude


FIRMWARE_MAJOR = Register(0)
FIRMWARE_MINOR = Register(1)
MODEL_NUMBER = Register(3, 2)
ID = Register(5)
BAUD_RATE = Register(6)
RETURN_DELAY_TIME = Register(7)  # 2 µs
RESPONSE_STATUS_LEVEL = Register(8)  # 0: only PING and READ are answered; 1: everything is
MIN_POSITION_LIMIT = Register(9, 2)
MAX_POSITION_LIMIT = Register(11, 2)
MAX_TEMPERATURE_LIMIT = Register(13)  # °C
MAX_VOLTAGE_LIMIT = Register(14)  # 0.1 V
MIN_VOLTAGE_LIMIT = Register(15)  # 0.1 V
MAX_TORQUE_LIMIT = Register(16, 2)  # 0.1 %; becomes TORQUE_LIMIT when the servo powers up
PHASE = Register(18)
UNLOADING_CONDITION = Register(19)  # which `Condition` bits release the torque
P_COEFFICIENT = Register(21)
D_COEFFICIENT = Register(22)
I_COEFFICIENT = Register(23)
PROTECTION_CURRENT = Register(28, 2)
HOMING_OFFSET = Register(31, 2, sign_bit=11)
OPERATING_MODE = Register(33)
PROTECTIVE_TORQUE = Register(34)  # %, what is left in overload
PROTECTION_TIME = Register(35)  # 10 ms
OVERLOAD_TORQUE = Register(36)  # %

TORQUE_ENABLE = Register(40)
ACCELERATION = Register(41)  # 100 steps/s²; 0 is unlimited
GOAL_POSITION = Register(42, 2, sign_bit=15)
GOAL_TIME = Register(44, 2)
GOAL_VELOCITY = Register(46, 2, sign_bit=15)  # steps/s; 0 is unlimited
TORQUE_LIMIT = Register(48, 2)  # 0.1 %
LOCK = Register(55)
PRESENT_POSITION = Register(56, 2, sign_bit=15)
PRESENT_VELOCITY = Register(58, 2, sign_bit=15)  # steps/s
PRESENT_LOAD = Register(60, 2, sign_bit=10)  # 0.1 % of the stall torque
PRESENT_VOLTAGE = Register(62)  # 0.1 V
PRESENT_TEMPERATURE = Register(63)  # °C
STATUS = Register(65)
MOVING = Register(66)
PRESENT_CURRENT = Register(69, 2, sign_bit=15)  # 6.5 mA

READ_ONLY = (range(0, 5), range(56, 80))

BAUD_RATES = (1_000_000, 500_000, 250_000, 128_000, 115_200, 57_600, 38_400, 19_200)
"""By the value of ``BAUD_RATE``."""


class Condition(IntFlag):
    """Bits of ``STATUS``, and of the error byte in every reply."""

    VOLTAGE = 1
    ENCODER = 2
    OVERHEATING = 4
    OVERCURRENT = 8
    OVERLOAD = 32

    @classmethod
    def words(cls, bits: int) -> tuple[str, ...]:
        """Name the conditions in `bits`; unknown bits are named by their number."""
        known = tuple(flag.name.lower() for flag in cls if bits & flag)
        unknown = bits & ~sum(cls)
        return known + ((f"unknown status bits {unknown:#04x}",) if unknown else ())


BY_NAME: dict[str, Register] = {name: it for name, it in list(globals().items()) if isinstance(it, Register)}
"""Every register by its name here."""

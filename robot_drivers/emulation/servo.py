"""One emulated STS3215: its memory table, what keeps it from moving, and how it moves.

Motion here is kinematic: a trapezoid towards the goal, within ``GOAL_VELOCITY`` and ``ACCELERATION``, no
masses. Without torque a joint drops at a fixed rate to `falls_to`, if gravity has anything to take it to.
`plant.MotorServo` follows the same trapezoid with a motor of limited torque.

Assumed of the servo, and not yet seen on hardware: switching torque on makes the present position the goal;
a condition of ``UNLOADING_CONDITION`` clears ``TORQUE_ENABLE``, except overload, which only stops driving the
joint until ``TORQUE_ENABLE`` is written again; a goal written without torque does not switch it on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..so101 import registers as r

FREE_SPEED = 3130.0
"""Steps/s of an unloaded servo without ``GOAL_VELOCITY``: 275 deg/s."""

FREE_ACCELERATION = 83000.0
"""Steps/s² without ``ACCELERATION``: 7300 deg/s²."""

FALL_SPEED = 1000.0
"""Steps/s of a joint that gravity takes."""

# Plain integers: arithmetic on flags is too slow for every servo's every tick.
VOLTAGE, OVERHEATING, OVERLOAD = map(
    int, (r.Condition.VOLTAGE, r.Condition.OVERHEATING, r.Condition.OVERLOAD)
)

FACTORY = {
    r.FIRMWARE_MAJOR: 3,
    r.FIRMWARE_MINOR: 10,
    r.MODEL_NUMBER: r.MODEL_STS3215,
    r.RESPONSE_STATUS_LEVEL: 1,
    r.MAX_POSITION_LIMIT: r.STEPS_PER_TURN - 1,
    r.MAX_TEMPERATURE_LIMIT: 70,
    r.MAX_VOLTAGE_LIMIT: 80,
    r.MIN_VOLTAGE_LIMIT: 40,
    r.MAX_TORQUE_LIMIT: 1000,
    r.UNLOADING_CONDITION: r.Condition.OVERHEATING | r.Condition.OVERCURRENT | r.Condition.OVERLOAD,
    r.P_COEFFICIENT: 32,
    r.D_COEFFICIENT: 32,
    r.PROTECTIVE_TORQUE: 20,
    r.PROTECTION_TIME: 200,
    r.OVERLOAD_TORQUE: 80,
}


def trapezoid(
    position: float, velocity: float, goal: float, speed: float, acceleration: float, dt: float
) -> tuple[float, float]:
    """Advance `dt` on the way to `goal`, as fast as allowed and as still lets it stop there."""
    gap, step = goal - position, acceleration * dt
    stopping = math.sqrt(step**2 + 2 * acceleration * abs(gap)) - step
    wanted = math.copysign(min(speed, stopping, abs(gap) / dt), gap)
    velocity = min(max(wanted, velocity - step), velocity + step)
    return position + velocity * dt, velocity


@dataclass
class EmulatedServo:
    """A servo on the bus; everything that is not a register is the world around it.

    `encoder` is the true position in steps, `temperature` in °C, `voltage` in V. `connected` is the cable,
    `jammed` holds the joint fast, `frozen` stops the encoder from following the joint. `eeprom` is what
    somebody wrote into its flash before, by register name.
    """

    id: int
    encoder: float = 2048.0
    temperature: float = 30.0
    voltage: float = 7.4
    connected: bool = True
    powered: bool = True
    jammed: bool = False
    frozen: bool = False
    falls_to: float | None = None
    velocity: float = 0.0
    eeprom: Mapping[str, int] = field(default_factory=dict)
    table: bytearray = field(default_factory=lambda: bytearray(128))

    def __post_init__(self):
        for register, value in FACTORY.items():
            self.put(register, value)
        self.put(r.ID, self.id)
        for name, value in self.eeprom.items():
            self.put(r.BY_NAME[name], value)
        self._flash = bytes(self.table[: r.EEPROM.stop])
        self._pending: tuple[int, bytes] | None = None
        self._seen = self.encoder
        self._strained = 0.0  # seconds of full load
        self._overloaded = False
        self._boot()

    def get(self, register: r.Register) -> int:
        """Return the value of a register."""
        if register.size == 1:  # most of them, and read in every tick
            return self.table[register.address]
        return register.unpack(self.table[register.span])

    def put(self, register: r.Register, value: int) -> None:
        """Set a register from outside the bus, where nothing is read-only."""
        self.table[register.span] = register.pack(value)

    def set_power(self, on: bool) -> None:
        """Cut or restore the supply; what is not in flash is lost."""
        self.powered, self.velocity = on, 0.0
        self.put(r.TORQUE_ENABLE, 0)
        if on:
            self._boot()

    def _boot(self) -> None:
        self.table[:] = self._flash + bytes(len(self.table) - len(self._flash))
        self.put(r.TORQUE_LIMIT, self.get(r.MAX_TORQUE_LIMIT))
        self.put(r.LOCK, 1)
        self._pending, self._strained, self._overloaded = None, 0.0, False
        self.sense()
        self.put(r.GOAL_POSITION, self.get(r.PRESENT_POSITION))

    def read(self, address: int, length: int) -> bytes:
        """Return `length` bytes from `address`; beyond the table there are zeros."""
        self.sense()
        return bytes(self.table[address : address + length]).ljust(length, b"\0")

    def write(self, address: int, data: bytes) -> None:
        """Write as the bus does: read-only bytes stay, EEPROM is kept only while unlocked."""
        had_torque = self.get(r.TORQUE_ENABLE)
        for offset, byte in enumerate(data[: len(self.table) - address]):
            if not any(address + offset in range_ for range_ in r.READ_ONLY):
                self.table[address + offset] = byte
        if address in r.EEPROM and not self.get(r.LOCK):
            self._flash = bytes(self.table[: r.EEPROM.stop])
        if r.TORQUE_ENABLE.address in range(address, address + len(data)):
            self._overloaded, self._strained = False, 0.0
            if not had_torque:
                self.sense()
                self.put(r.GOAL_POSITION, self.get(r.PRESENT_POSITION))
        self.id = self.get(r.ID)

    def write_later(self, address: int, data: bytes) -> None:
        """Keep a REG_WRITE until `act`."""
        self._pending = (address, data)

    def act(self) -> None:
        """Carry out what `write_later` kept."""
        if self._pending is not None:
            self.write(*self._pending)
            self._pending = None

    def status(self) -> int:
        """Return the `Condition` bits of this moment."""
        bits = 0
        tenths = round(10 * self.voltage)
        if not self.get(r.MIN_VOLTAGE_LIMIT) <= tenths <= self.get(r.MAX_VOLTAGE_LIMIT):
            bits |= VOLTAGE
        if self.temperature > self.get(r.MAX_TEMPERATURE_LIMIT):
            bits |= OVERHEATING
        if self._overloaded:
            bits |= OVERLOAD
        return bits

    def tick(self, dt: float) -> None:
        """Let `dt` seconds pass."""
        driven = self.protect() and not self._overloaded
        if self.jammed:
            self.velocity = 0.0
        elif driven:
            self.encoder, self.velocity = self.advance(self.encoder, self.velocity, dt)
        else:
            self._fall(dt)
        strained = driven and self.jammed and abs(self.goal() - self.encoder) > 20
        self.strain(dt, self.get(r.TORQUE_LIMIT) / 1000 if strained else 0.0)

    def protect(self) -> bool:
        """Cut the torque where a condition or the supply says so; return whether there is any."""
        cut = self.status() & self.get(r.UNLOADING_CONDITION) & ~OVERLOAD
        if cut or not self.powered:
            self.put(r.TORQUE_ENABLE, 0)
        return self.get(r.TORQUE_ENABLE) == 1

    def goal(self) -> float:
        """Return the goal in steps of the encoder; the servo keeps it within its position limits."""
        low, high = self.get(r.MIN_POSITION_LIMIT), self.get(r.MAX_POSITION_LIMIT)
        return min(max(self.get(r.GOAL_POSITION), low), high) + self.get(r.HOMING_OFFSET)

    def advance(self, position: float, velocity: float, dt: float) -> tuple[float, float]:
        """Return position and velocity (steps, steps/s) `dt` later on the way to the goal."""
        acceleration = 100.0 * self.get(r.ACCELERATION) or FREE_ACCELERATION
        speed = min(abs(self.get(r.GOAL_VELOCITY)) or FREE_SPEED, FREE_SPEED)
        return trapezoid(position, velocity, self.goal(), speed, acceleration, dt)

    def _fall(self, dt: float) -> None:
        self.velocity = 0.0
        if self.falls_to is not None:
            gap = self.falls_to - self.encoder
            self.velocity = math.copysign(min(FALL_SPEED, abs(gap) / dt), gap)
            self.encoder += self.velocity * dt

    def strain(self, dt: float, load: float) -> None:
        """Feel `load`, -1 to 1 of the stall torque, for `dt` seconds; too much too long is an overload."""
        heavy = 100 * abs(load) > self.get(r.OVERLOAD_TORQUE)
        self._strained = self._strained + dt if heavy else 0.0
        if self._strained > self.get(r.PROTECTION_TIME) / 100:
            self._overloaded = True
        self.put(r.PRESENT_LOAD, min(max(round(1000 * load), -1000), 1000))

    def sense(self) -> None:
        """Bring the read-only registers up to date."""
        if not self.frozen:
            self._seen = self.encoder
        self.put(r.PRESENT_POSITION, round(self._seen) - self.get(r.HOMING_OFFSET))
        self.put(r.PRESENT_VELOCITY, 0 if self.frozen else round(self.velocity))
        self.put(r.PRESENT_VOLTAGE, min(max(round(10 * self.voltage), 0), 255))
        self.put(r.PRESENT_TEMPERATURE, round(self.temperature))
        self.put(r.STATUS, self.status())
        self.put(r.MOVING, int(abs(self.velocity) > 1))

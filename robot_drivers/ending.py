"""How an arm is left: brake, ramp to rest, release each joint on its own. Never raises, always ends.

    steered       brake ──► ramp to rest, watched ──► release
    faulty        ramp to rest as well as it can, unwatched, slow ──► release
    lost          take the link up again, for a while ──► as above, as far as it answers

Both ramps have a number of control periods. Nobody is there any more, so an arm that cannot be brought to
rest is released where it got to: a joint that is left holding against an obstacle burns out. What could not
be released is reported, never passed over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from vla.errors import UserError

from .driver import DriverInfo
from .faults import BusCorrupt, BusTimeout, Disconnected, DriverFault, ServoFault
from .supervisor import ENERGISED, Cycle, Mode, Ramp, Supervisor

BRAKE = 0.25
"""Seconds in which the arm stands before it is lowered; every joint can brake in that time."""

SETTLE = 1.5
"""Seconds of control periods beyond the ramp's own duration in which the arm must have arrived."""

RECONNECT_PAUSE = 0.25  # s


@dataclass(frozen=True)
class Ending:
    """How it went: why the arm was left, whether it was seen at rest, and which joints may have kept torque.

    `at_rest` is None for an arm whose torque nobody had touched: it was left as it was found.
    """

    reason: str
    at_rest: bool | None
    unreleased: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """What a person has to know."""
        if self.unreleased:
            what = (
                f"{', '.join(self.unreleased)} could not be released and may still hold: support the arm and"
                " switch the motor supply off."
            )
        elif self.at_rest is None:
            what = "The arm was left as it was found."
        elif self.at_rest:
            what = "The arm is at rest and released."
        else:
            what = "The arm was released, but not seen at rest."
        return f"{self.reason} {what}"


def leave(
    supervisor: Supervisor,
    reason: str,
    *,
    patience: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    on_cycle: Callable[[Cycle], None] = lambda cycle: None,
) -> Ending:
    """Bring the arm to rest, release every joint and give the link back.

    `patience` (s) is spent on a link that is lost. `on_cycle` sees every watched control period. An arm that
    was stopped by `Supervisor.emergency_stop` is not commanded any more, only released once again.
    """
    leaving = Leaving(supervisor, clock, sleep, on_cycle)
    if supervisor.mode is Mode.LOST:
        leaving.reconnect(patience)
    if supervisor.mode in ENERGISED:
        leaving.lower_watched()
    if supervisor.mode not in ENERGISED and supervisor.holding and any(supervisor.state.enabled):
        leaving.lower_unwatched()
    ending = Ending(reason, None)
    if supervisor.touched:
        ending = Ending(reason, leaving.seen_at_rest(), leaving.release())
    supervisor.close()
    return ending


class Leaving:
    """The steps of `leave`, at the arm's control rate."""

    def __init__(self, supervisor: Supervisor, clock, sleep, on_cycle):
        self.supervisor, self.clock, self.sleep, self.on_cycle = supervisor, clock, sleep, on_cycle
        self.info: DriverInfo = supervisor.driver.info

    def reconnect(self, patience: float) -> None:
        """Take a lost arm up again and hold it where it is, if it comes back within `patience` seconds."""
        until = self.clock() + patience
        while True:
            try:
                self.supervisor.reset()
                self.supervisor.enable(self.clock())
                return
            except Disconnected:
                if self.clock() >= until:
                    return
                self.sleep(RECONNECT_PAUSE)
            except UserError:  # it answers in part, or is faulty: lowered unwatched
                return

    def lower_watched(self) -> None:
        """Brake, then follow the supervisor's ramp to rest until it is there or too late."""
        self.supervisor.hold()
        self._cycles(BRAKE, lambda: False)
        if self.supervisor.mode in ENERGISED:
            self.supervisor.rest(self.clock())
            self._cycles(self.supervisor.ramp.duration + SETTLE, self._arrived)

    def lower_unwatched(self) -> None:
        """Send the ramp to rest without asking for measurements: some joints are faulty, deaf or limp."""
        start = np.clip(self.supervisor.state.q, self.info.lower, self.info.upper)
        speed = self.supervisor.config.rest_speed * self.info.velocity
        duration = float((np.abs(self.supervisor.rest_pose - start) / speed).max())
        ramp = Ramp(start, self.supervisor.rest_pose, self.clock(), duration)
        for _ in self._periods(duration + SETTLE):
            if not self.supervisor.holding:
                return
            try:
                self.supervisor.driver.write(ramp.at(self.clock()))
            except (BusTimeout, BusCorrupt):
                pass  # goals are not acknowledged; the next one says the same
            except DriverFault:
                return

    def release(self) -> tuple[str, ...]:
        """Switch every joint off on its own; return the names of those that did not confirm."""
        faults = self.supervisor.driver.disable()
        named = [_joints(fault) or self.info.joint_names for fault in faults]
        return tuple(name for name in self.info.joint_names if any(name in joints for joints in named))

    def seen_at_rest(self) -> bool:
        """Whether a sample taken now shows every joint at the rest pose."""
        try:
            q = self.supervisor.look().q  # also what a lost cycle did not see
        except DriverFault:
            return False
        return self.supervisor.is_rest(q)

    def _cycles(self, seconds: float, done: Callable[[], bool]) -> None:
        for _ in self._periods(seconds):
            if self.supervisor.mode not in ENERGISED or done():
                return
            self.on_cycle(self.supervisor.cycle(self.clock()))

    def _periods(self, seconds: float) -> Iterator[None]:
        """Yield once per control period of the next `seconds`.

        Periods are counted, not timed: while a busy computer does not come to its turn the arm is not
        commanded, and the filter then sets off from standstill. An arm let go for that would fall.
        """
        begin = self.clock()
        for _ in range(math.ceil(seconds * self.info.control_rate)):
            yield
            self._pause(begin)

    def _arrived(self) -> bool:
        """At rest, and the command has arrived as well: the last goal is the rest pose."""
        return self.supervisor.at_rest and not self.supervisor.moving

    def _pause(self, begin: float) -> None:
        """Sleep until the next control period, counted from `begin`; one that is all but over is skipped."""
        period = 1 / self.info.control_rate
        left = period - (self.clock() - begin) % period
        self.sleep(left if left > 0.01 * period else left + period)


def _joints(fault: DriverFault) -> tuple[str, ...]:
    """Return which joints the fault is about, as far as it says."""
    return (fault.joint,) if isinstance(fault, ServoFault) else getattr(fault, "joints", ())

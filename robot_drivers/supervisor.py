"""What an arm may do when: the state machine between a policy and a driver.

    OFF ──open──► OPEN ──enable──► HOLD ◄──────► TRACK
                   ▲                 │  setpoint /  │
                   │release          │  stale 0.25 s│
                   └──── REST ◄──────┴──stale 3 s───┘        FAULT, LOST: latched, left by reset alone

The owner of the arm calls `Supervisor.cycle` once per control period; it never raises for what the arm or
the policy does. A policy that falls silent, or sends what the filter refuses, makes the arm brake and hold,
and then ramp to its rest pose. A fault of the arm is held, never answered by letting go: an arm that falls
when released is only released at rest, or by `emergency_stop`.
"""

from __future__ import annotations

import enum
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from vla.errors import UserError

from .driver import RobotDriver, State
from .faults import BusCorrupt, BusTimeout, DriverFault, LimitViolation, ServoFault
from .safety_filter import SafetyFilter


class Mode(enum.Enum):
    """Where the arm stands in its life."""

    OFF = "off"
    OPEN = "open"
    HOLD = "hold"
    TRACK = "track"
    REST = "rest"
    FAULT = "fault"
    LOST = "lost"


FEWEST_MISSED = 3
"""Samples in a row that must fail before an arm is lost."""

PATIENCE = 5
"""Attempts at a sample, at least, while nothing moves."""

LOOK_AGAIN = 0.005  # s

ENERGISED = frozenset({Mode.HOLD, Mode.TRACK, Mode.REST})


class ModeError(UserError):
    """The arm is not in a mode in which this can be asked of it."""


@dataclass(frozen=True)
class SupervisorConfig:
    """Times in seconds. Raises `UserError` if they cannot work."""

    stale_hold: float = 0.25
    """A setpoint older than this is not followed any more."""
    stale_rest: float = 3.0
    """A policy that is silent for longer has ended: the arm goes to rest."""
    sample_patience: float = 0.1
    """A measurement older than this is no base for motion."""
    lost_after: float = 0.5
    """Without a measurement for longer, the arm is lost."""
    rest_speed: float = 0.3
    """Fraction of the joints' velocity bounds on the way to the rest pose."""
    rest_tolerance: float = 0.03
    """Fraction of a joint's range within which it counts as at rest."""
    behind: float = 0.06
    """Fraction of its range by which a joint may stay behind its command for longer than `behind_after`."""
    behind_after: float = 3.0
    """A joint that is further behind for so long does not follow: blocked, or its encoder stands still."""

    def __post_init__(self):
        ordered = 0 < self.stale_hold < self.stale_rest and 0 < self.sample_patience <= self.lost_after
        fractions = (self.rest_speed, self.rest_tolerance, self.behind)
        if not ordered or not all(0 < it <= 1 for it in fractions) or not self.behind_after > 0:
            raise UserError(
                f"{self} cannot work: it needs 0 < stale_hold < stale_rest, 0 < sample_patience <="
                " lost_after, behind_after > 0, and rest_speed, rest_tolerance and behind in (0, 1]."
            )


@dataclass(frozen=True)
class Ramp:
    """A straight line in joint space from `start` to `goal` (J,), from time `begin` on for `duration` s."""

    start: np.ndarray
    goal: np.ndarray
    begin: float
    duration: float

    def at(self, now: float) -> np.ndarray:
        """Return the position (J,) that is due at `now`."""
        share = 1.0 if self.duration <= 0 else min(max((now - self.begin) / self.duration, 0.0), 1.0)
        return self.start + share * (self.goal - self.start)


@dataclass(frozen=True)
class Setpoint:
    """Where the policy wants the joints, asked for at `time` (s) and due `within` so many seconds."""

    q: Mapping[str, float]
    time: float
    within: float


@dataclass(frozen=True)
class Cycle:
    """What one control period did: asked, sent, measured, and why they differ.

    `asked` is the setpoint followed (None: hold), `sent` (J,) what went to the arm (None: nothing), `state`
    the newest sample (None before the first), `fresh` whether it is of this cycle.
    """

    time: float
    mode: Mode
    asked: Mapping[str, float] | None
    sent: np.ndarray | None
    state: State | None
    fresh: bool
    interventions: Mapping[str, str] = field(default_factory=dict)
    fault: DriverFault | None = None


class Supervisor:
    """Runs one arm. `rest` (J,) is the pose in which it can be released without harm.

    One thread calls everything; `setpoint` alone may come from another. Times are of one monotonic clock.
    """

    def __init__(
        self,
        driver: RobotDriver,
        rest: np.ndarray,
        filter: SafetyFilter | None = None,
        config: SupervisorConfig | None = None,
    ):
        self.driver, self.config = driver, config or SupervisorConfig()
        self.filter = filter or SafetyFilter(driver.info)
        # The way to rest knows no box: an arm that could not lie down would fall when it is released.
        self._lowering = replace(self.filter, workspace=None)
        self.rest_pose = np.asarray(rest, float)
        info = driver.info
        if (
            self.rest_pose.shape != info.lower.shape
            or not ((self.rest_pose >= info.lower) & (self.rest_pose <= info.upper)).all()
        ):
            raise UserError(
                f"The rest pose {self.rest_pose.tolist()} of '{info.name}' is not inside its joints' limits."
            )
        self.mode = Mode.OFF
        self.fault: DriverFault | None = None
        self.touched = False  # torque was switched on from here, or taken over
        self.holding = False  # touched, and not released since
        self._posted: Setpoint | None = None
        self._line: tuple[Setpoint, Ramp] | None = None  # which setpoint is followed, and the way to it
        self._active: float | None = None  # when a setpoint was last followed
        self._missed = 0  # samples in a row
        self._followed = np.zeros(0)  # when each joint was last near its command
        self.ramp: Ramp | None = None
        self._state: State | None = None

    def open(self) -> None:
        """Identify the arm; nothing moves. Raises `DriverFault` and stays off if that fails."""
        self._require("open", Mode.OFF)
        try:
            self.driver.open()
            self._state = self.look()
        except UserError:
            self.driver.close()
            raise
        self._missed, self.mode = 0, Mode.OPEN

    def enable(self, now: float) -> None:
        """Take hold of the arm where it is.

        Raises `DriverFault` if it is faulty or stands outside its limits, and leaves an arm without torque
        without torque.
        """
        self._require("enable", Mode.OPEN)
        state = self.look()
        if state.faults:
            raise state.faults[0]
        filtered = self.filter.start(now, state.q)  # refuses before any torque is on
        self.touched = self.holding = True
        try:
            self.driver.enable()
            self._state = self.look()
            faults = self._faults(self._state)
            if faults:
                raise faults[0]
        except DriverFault:
            if not any(state.enabled):
                self.driver.disable()
                self.holding = False
            raise
        self._filtered, self._posted, self._active, self._missed = filtered, None, None, 0
        self._line = None
        self._followed = np.full(len(filtered.q), now)
        self.mode = Mode.HOLD

    def setpoint(self, q: Mapping[str, float], now: float, within: float = 0.0) -> None:
        """Post what the policy wants: joint name to position. One older than the last is dropped.

        It is due `within` so many seconds (`stale_hold` at most), and on a straight line until then. A policy
        that gives its period moves the arm evenly; steps (0) are set off for and braked for one by one.
        """
        posted = self._posted
        if posted is None or now >= posted.time:
            self._posted = Setpoint(dict(q), now, min(within, self.config.stale_hold))

    def hold(self) -> None:
        """Stop where it is until the next setpoint (also after REST)."""
        self._require("hold", *ENERGISED)
        self._posted, self._active, self.mode = None, None, Mode.HOLD

    def rest(self, now: float) -> None:
        """Ramp to the rest pose and stay there; setpoints are ignored until `hold`."""
        self._require("rest", *ENERGISED)
        start = self._filtered.q
        slowest = np.abs(self.rest_pose - start) / (self.config.rest_speed * self.driver.info.velocity)
        self.ramp = Ramp(start, self.rest_pose, now, float(slowest.max()))
        self.mode = Mode.REST

    @property
    def at_rest(self) -> bool:
        """Whether every joint was last measured at the rest pose."""
        return self._state is not None and self.is_rest(self._state.q)

    def is_rest(self, q: np.ndarray) -> bool:
        """Return whether the position `q` (J,) counts as the rest pose."""
        span = self.driver.info.upper - self.driver.info.lower
        return bool((np.abs(q - self.rest_pose) <= self.config.rest_tolerance * span).all())

    @property
    def moving(self) -> bool:
        """Whether what was sent last still moves some joint."""
        return bool(self._filtered.v.any())

    @property
    def state(self) -> State | None:
        """The newest sample; None before the first."""
        return self._state

    def release(self) -> list[DriverFault]:
        """Switch torque off; return what could not be released. An arm that falls must be at rest."""
        self._require("release", *ENERGISED, Mode.FAULT)
        if self.driver.info.power_off == "falls" and not self.at_rest:
            raise ModeError(
                f"'{self.driver.info.name}' would fall: send it to rest first, or use the emergency stop."
            )
        return self.emergency_stop()

    def emergency_stop(self) -> list[DriverFault]:
        """Switch torque off now, wherever the arm is. Return what could not be released."""
        self._require("emergency_stop", *set(Mode) - {Mode.OFF})
        failed = self.driver.disable()
        self.holding = False
        if self.mode in ENERGISED:  # a latched fault stays latched
            self.mode = Mode.OPEN
        return failed

    def reset(self) -> None:
        """Acknowledge a fault, after which the arm is OPEN and can be enabled.

        Raises `DriverFault`, and stays as it is, if the fault persists.
        """
        self._require("reset", Mode.FAULT, Mode.LOST)
        if self.mode is Mode.LOST:
            self.driver.close()
            self.driver.open()
        self.driver.clear_faults()
        state = self.look()
        if state.faults:
            raise state.faults[0]
        self._state, self.fault, self._missed, self.mode = state, None, 0, Mode.OPEN

    def close(self) -> None:
        """Give the link back. Torque stays as it is; idempotent."""
        self.driver.close()
        self.mode = Mode.OFF

    def cycle(self, now: float) -> Cycle:
        """Do one control period: sample, judge, filter, command. Raises `ModeError` before `open` alone."""
        self._require("cycle", *set(Mode) - {Mode.OFF})
        if self.mode is Mode.LOST:
            return Cycle(now, self.mode, None, None, self._state, False, {}, self.fault)
        fresh = self._sample(now)
        if self.mode is Mode.OPEN or self.mode is Mode.LOST:
            return Cycle(now, self.mode, None, None, self._state, fresh, {}, self.fault)
        asked = self._asked(now)
        return self._command(now, asked, fresh)

    def look(self) -> State:
        """Return a sample of an arm that stands: here a few lost replies are not worth a failure."""
        until = time.monotonic() + self.config.lost_after
        for attempt in itertools.count(1):
            try:
                return self.driver.read()
            except (BusTimeout, BusCorrupt):
                if attempt >= PATIENCE and time.monotonic() > until:
                    raise
            time.sleep(LOOK_AGAIN)

    def _sample(self, now: float) -> bool:
        """Read the arm; latch FAULT or LOST. Returns whether there is a new sample."""
        try:
            state = self.driver.read()
        except (BusTimeout, BusCorrupt) as fault:
            self._missed += 1  # counted as well as timed: a caller that was away has not lost the arm
            if self._missed >= FEWEST_MISSED and self._state.age(now) > self.config.lost_after:
                self._latch(Mode.LOST, fault)
            return False
        except DriverFault as fault:
            self._latch(Mode.LOST, fault)
            return False
        self._state, self._missed = state, 0
        faults = (*self._faults(state), *self._behind(now, state)) if self.mode in ENERGISED else ()
        if faults:
            self._latch(Mode.FAULT, faults[0])
        return True

    def _faults(self, state: State) -> tuple[DriverFault, ...]:
        """Return the arm's complaints, and the joints that let go on their own."""
        limp = [
            ServoFault(name, ["lost torque"], "Check the motor supply, then reset.")
            for name, on in zip(self.driver.info.joint_names, state.enabled, strict=True)
            if not on
        ]
        return (*state.faults, *limp)

    def _behind(self, now: float, state: State) -> list[ServoFault]:
        """Return the joints that do not follow. A gripper may: it holds something."""
        info = self.driver.info
        near = np.abs(self._filtered.q - state.q) <= self.config.behind * (info.upper - info.lower)
        self._followed = np.where(near, now, self._followed)
        return [
            ServoFault(
                joint.name, ["no motion towards its goal"], "Free it or check its encoder, then reset."
            )
            for joint, since in zip(info.joints, self._followed, strict=True)
            if joint.kind != "gripper" and now - since > self.config.behind_after
        ]

    def _latch(self, mode: Mode, fault: DriverFault) -> None:
        if self.fault is None or mode is Mode.LOST:
            self.fault = fault
        self.mode = mode

    def _asked(self, now: float) -> Mapping[str, float] | None:
        """Return the setpoint to follow, and move between HOLD, TRACK and REST."""
        if self.mode is Mode.FAULT or self._state.age(now) > self.config.sample_patience:
            return None
        silent = 0.0 if self._active is None else now - self._active
        if self.mode is not Mode.REST and silent > self.config.stale_rest:
            self.rest(now)
        if self.mode is Mode.REST:
            return self._named(self.ramp.at(now))
        posted = self._posted
        if posted is None or not abs(now - posted.time) <= self.config.stale_hold:
            self._posted = None  # also one from the future, which would keep out every later one
            self.mode = Mode.HOLD
            return None
        self.mode = Mode.TRACK
        self._lay_line(posted)
        return posted.q

    def _lay_line(self, posted: Setpoint) -> None:
        """Begin the way to a setpoint that is new: where the last one's had led, or where the arm is sent."""
        if self._line is not None and self._line[0] is posted:
            return
        start = self._filtered.q if self._line is None else self._line[1].at(posted.time)
        try:
            goal = self.filter.vector(posted.q)
        except LimitViolation:  # the filter will say so
            self._line = None
        else:
            self._line = posted, Ramp(start, goal, posted.time, posted.within)

    def _due(self, now: float, asked: Mapping[str, float] | None) -> Mapping[str, float] | None:
        """Return where the joints are due at `now`, on the way to what is asked."""
        if self.mode is not Mode.TRACK:
            self._line = None
        if self._line is None or asked is None:
            return asked
        return self._named(self._line[1].at(now))

    def _named(self, q: np.ndarray) -> dict[str, float]:
        """Return positions (J,) by the names of their joints."""
        return dict(zip(self.driver.info.joint_names, q.tolist(), strict=True))

    def _command(self, now: float, asked: Mapping[str, float] | None, fresh: bool) -> Cycle:
        """Filter and send. A faulty arm is braked, and not commanded any more once it stands."""
        before = self._filtered
        filter = self._lowering if self.mode is Mode.REST else self.filter
        self._filtered, interventions = filter.step(before, now, self._due(now, asked), self._state.q)
        if self.mode is Mode.TRACK and "setpoint" in interventions:
            self.mode = Mode.HOLD
        elif self.mode is Mode.TRACK:
            self._active = now
        sent = self._filtered.q if self.mode is not Mode.FAULT or before.v.any() else None
        if sent is not None:
            try:
                self.driver.write(sent)
            except (BusTimeout, BusCorrupt):
                sent = None  # as good as a lost reply: `_sample` counts the time without an answer
            except LimitViolation as fault:
                self._latch(Mode.FAULT, fault)
            except DriverFault as fault:
                self._latch(Mode.LOST, fault)
                sent = None
        return Cycle(now, self.mode, asked, sent, self._state, fresh, interventions, self.fault)

    def _require(self, what: str, *modes: Mode) -> None:
        if self.mode not in modes:
            allowed = ", ".join(sorted(mode.value for mode in modes))
            raise ModeError(
                f"'{self.driver.info.name}' is {self.mode.value}: {what} is possible only in mode {allowed}."
            )

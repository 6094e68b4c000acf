"""A recorded run, driven again: the goals that were sent then are the setpoints of now.

They pass the safety filter of the arm that is there, so a record of another calibration or of a faster arm is
slowed down or cut off like any other policy, not obeyed blindly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vla.errors import UserError

from .arm import Arm
from .recorder import Record
from .supervisor import Cycle, Mode, Ramp

APPROACH = 0.3
"""Fraction of the joints' velocity bounds on the way to where the record begins and ends."""

SETTLE = 3.0
"""Seconds in which the arm must have followed once it is asked to stand still."""


@dataclass(frozen=True)
class Track:
    """A path in joint space: `goals` (N, J) at `times` (N,) s, rising from 0."""

    times: np.ndarray
    goals: np.ndarray

    @property
    def duration(self) -> float:
        """Seconds from the first goal to the last."""
        return float(self.times[-1])

    def at(self, seconds: float) -> np.ndarray:
        """Return the goal (J,) at that time, on straight lines between the recorded ones."""
        return np.array([np.interp(seconds, self.times, goals) for goals in self.goals.T])


@dataclass(frozen=True)
class Replayed:
    """How a replay went: seconds, and per joint the largest distance of the measurement from the goal."""

    duration: float
    deviation: np.ndarray
    interventions: int


def track(record: Record) -> Track:
    """Return the goals that moved the arm: those of mode TRACK. Raises `UserError` if there are none."""
    rows = [it for it in record.cycles if it.mode is Mode.TRACK and it.sent is not None]
    if len(rows) < 2:
        raise UserError("The record holds no motion: the arm never followed a policy in it.")
    times = np.array([it.time for it in rows])
    if not (np.diff(times) > 0).all():
        raise UserError("The record's times do not rise: it was put together from several runs.")
    return Track(times - times[0], np.array([it.sent for it in rows]))


def replay(
    record: Record,
    arm: Arm,
    speed: float = 1.0,
    on_cycle: Callable[[Cycle], None] = lambda cycle: None,
) -> Replayed:
    """Go slowly to where the record begins, then drive it, `speed` times as fast. The arm must be enabled.

    Raises `UserError` for a record of other joints, an arm that cannot follow, or a fault.
    """
    if record.info.joint_names != arm.info.joint_names:
        raise UserError(
            f"The record is of joints {list(record.info.joint_names)}, the arm has"
            f" {list(arm.info.joint_names)}."
        )
    if not 0 < speed <= 4:
        raise UserError(f"A replay cannot be {speed:g} times as fast: give a speed above 0 and up to 4.")
    path = track(record)
    _approach(arm, path.goals[0], on_cycle)
    deviation, interventions = np.zeros(len(arm.info.joints)), 0
    begin, steps = time.monotonic(), 0
    while (elapsed := time.monotonic() - begin) * speed < path.duration:
        goal = path.at(elapsed * speed)
        cycle = _step(arm, goal, on_cycle)
        deviation = np.maximum(deviation, np.abs(cycle.state.q - goal))
        interventions += bool(cycle.interventions)
        steps += 1
        _pause(arm, begin, steps)
    done = Replayed(time.monotonic() - begin, deviation, interventions)
    _approach(arm, path.goals[-1], on_cycle)  # a record that is too fast for the arm ends there, too
    return done


def _approach(arm: Arm, goal: np.ndarray, on_cycle: Callable[[Cycle], None]) -> None:
    """Ramp to `goal` (J,) and wait until the arm stands there."""
    start, info = arm.latest().state.q, arm.info
    duration = float((np.abs(goal - start) / (APPROACH * info.velocity)).max())
    begin, steps = time.monotonic(), 0
    ramp, close = Ramp(start, goal, begin, duration), 0.05 * (info.upper - info.lower)
    while True:
        cycle = _step(arm, ramp.at(time.monotonic()), on_cycle)
        now = time.monotonic()
        if now > begin + duration:
            away = np.abs(cycle.state.q - goal) > close
            if not away.any():
                return
            if now > begin + duration + SETTLE:
                names = [name for name, far in zip(info.joint_names, away, strict=True) if far]
                raise UserError(f"The arm does not reach where the record leads: {names} stay away.")
        steps += 1
        _pause(arm, begin, steps)


def _step(arm: Arm, goal: np.ndarray, on_cycle: Callable[[Cycle], None]) -> Cycle:
    arm.setpoint(dict(zip(arm.info.joint_names, goal.tolist(), strict=True)))
    cycle = arm.latest()
    on_cycle(cycle)
    if cycle.fault is not None:
        raise cycle.fault
    return cycle


def _pause(arm: Arm, begin: float, steps: int) -> None:
    """Sleep until the deadline of step number `steps`."""
    period = 1 / (arm.config.rate or arm.info.control_rate)
    time.sleep(max(begin + steps * period - time.monotonic(), 0.0))

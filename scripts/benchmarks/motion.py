"""How evenly an arm moves between the actions of a policy: on a line to each, and not in steps.

The emulated SO101, with masses and in simulated time, follows one smooth path whose points are posted at the
rate of a policy. Ours is what `vla run` does: a setpoint is due when the next one comes. The baselines are
the same setpoints as steps, through the same safety filter, and the same points written into the servos with
the registers of LeRobot's `SO101Follower` (full acceleration, no speed limit). Unrest is the root mean square
of what the joints accelerate beyond the path's own; lag is the delay at which they match the path best.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from vla.robot_drivers import Supervisor
from vla.robot_drivers.emulation.direct import direct_driver
from vla.robot_drivers.emulation.line import EmulatedLine
from vla.robot_drivers.emulation.tabletop import Tabletop
from vla.robot_drivers.so101 import registers as r
from vla.robot_drivers.so101.calibration import JOINTS

CYCLE = 0.01  # s, of the arm's loop
SETTLING = 3.0  # s, on the way to where the path begins
MIDDLE = np.array([0.0, -0.6, 0.7, 0.4, 0.0, 0.3])
SWING = np.array([0.35, 0.2, -0.2, 0.15, 0.4, 0.0])
FREQUENCY = 0.25  # Hz
FULL_ACCELERATION, NO_LIMIT = 254, 0


def run(seconds: float = 12.0, rates: tuple[float, ...] = (10.0, 20.0, 30.0)) -> list[dict[str, Any]]:
    """Follow the path for `seconds` at every rate of actions, in each of the three ways."""
    rows = []
    for rate in rates:
        ours, steps = (judge(EmulatedArm().follow(rate, seconds, within)) for within in (1 / rate, 0.0))
        straight = judge(EmulatedArm().follow_straight(rate, seconds))
        for baseline, theirs in (("steps", steps), ("straight to the servos", straight)):
            rows += [
                {
                    "name": f"{name} at {rate:g} actions/s",
                    "value": ours[name],
                    "unit": unit,
                    "baseline": baseline,
                    "baseline_value": theirs[name],
                    "ratio": ours[name] / theirs[name],
                }
                for name, unit in (("unrest", "rad/s²"), ("lag", "ms"))
            ]
    return rows


def path(seconds: float) -> np.ndarray:
    """Return where the joints are wanted, (6,): rad, and the gripper's opening as a fraction."""
    return MIDDLE + SWING * math.sin(2 * math.pi * FREQUENCY * max(seconds, 0.0))


class EmulatedArm:
    """An arm on the table that holds where the path begins; time passes with every cycle."""

    def __init__(self):
        self.table = Tabletop()
        self.line = EmulatedLine(world=self.table)
        self.now = 0.0
        self.driver = direct_driver(self.line, self.table.calibration, CYCLE, lambda: self.now)
        self.supervisor = Supervisor(self.driver, np.array(self.driver.info.rest))
        self.supervisor.open()
        self.supervisor.enable(self.now)
        self.follow(1 / CYCLE, SETTLING, 0.0, begin=-SETTLING)

    def follow(self, rate: float, seconds: float, within: float, begin: float = 0.0) -> np.ndarray:
        """Post the path's points at `rate`, due `within` s; return the joints' angles (T, 6) in rad."""
        angles, start = [], self.now
        for time, goal in points(rate, seconds, begin):
            if goal is not None:
                setpoint = dict(zip(JOINTS, goal.tolist(), strict=True))
                self.supervisor.setpoint(setpoint, start + time, within)
            self.now += CYCLE
            self.supervisor.cycle(self.now)
            angles.append(self.table.plant.angles())
        return np.array(angles)

    def follow_straight(self, rate: float, seconds: float) -> np.ndarray:
        """Write the path's points into the servos; return the joints' angles (T, 6) in rad."""
        for servo in self.line.servos.values():
            servo.put(r.ACCELERATION, FULL_ACCELERATION)
            servo.put(r.GOAL_VELOCITY, NO_LIMIT)
        angles, goal = [], path(0.0)
        for _, point in points(rate, seconds):
            goal = goal if point is None else point
            self.now += CYCLE
            self.driver.write(goal)  # the same again between actions: nothing changes but the time
            angles.append(self.table.plant.angles())
        return np.array(angles)


def points(rate: float, seconds: float, begin: float = 0.0) -> Iterator[tuple[float, np.ndarray | None]]:
    """Yield for every cycle the point of the path (6,) that is new in it and its time (s); None for most."""
    posted = 0
    for cycle in range(round(seconds / CYCLE)):
        time = posted / rate
        due = cycle * CYCLE >= time - 1e-9
        yield time, path(begin + time) if due else None
        posted += due


def judge(angles: np.ndarray) -> dict[str, float]:
    """Return unrest (rad/s²) and lag (ms) of the arm's five joints, once the first second is over."""
    moved, since = angles[:, :5], round(1 / CYCLE)

    def ideal(lag: float) -> np.ndarray:
        return np.array([path((k + 1) * CYCLE - lag)[:5] for k in range(len(moved))])

    lags = np.arange(0.0, 0.3, 0.002)
    lag = min(lags, key=lambda lag: np.mean((moved - ideal(lag))[since:] ** 2))
    extra = np.diff(moved - ideal(lag), 2, axis=0)[since:] / CYCLE**2
    return {"unrest": float(np.sqrt(np.mean(extra**2))), "lag": 1e3 * float(lag)}

"""An arm that is looked at and not touched: what a run would send, after the safety filter."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from vla.robot_drivers import Arm, Cycle, DriverInfo


class DryArm:
    """Reads `arm` and passes what would be sent to `show`, one line a time.

    The arm stands still, so the filter follows an ideal arm that goes where it is sent.
    """

    def __init__(self, arm: Arm, show: Callable[[str], None]):
        self._arm, self._show = arm, show
        self._filter = arm.config.safety_filter(self.info)
        self._state = None
        self._begin = 0.0

    @property
    def info(self) -> DriverInfo:
        """The arm's description."""
        return self._arm.info

    def latest(self) -> Cycle:
        """Return the newest control period of the real arm."""
        return self._arm.latest()

    def setpoint(self, q: Mapping[str, float], within: float = 0.0) -> None:
        """Filter and show where the arm would be by the next setpoint; nothing goes to the arm."""
        now = time.monotonic()
        if self._state is None:
            self._state = self._filter.start(now, self.latest().state.q)
            self._begin = now
            self._show("   time " + " ".join(f"{name:>14}" for name in self.info.joint_names))
            return
        filtered = self._filter.step(self._state, now, q, self._state.q)
        self._state = filtered.state
        values = " ".join(
            f"{in_words(value, joint.unit):>14}"
            for value, joint in zip(filtered.state.q, self.info.joints, strict=True)
        )
        why = "; ".join(f"{name}: {reason}" for name, reason in filtered.interventions.items())
        self._show(f"{now - self._begin:6.2f}s {values}{f'   ({why})' if why else ''}")


def in_words(value: float, unit: str) -> str:
    """Return a joint's position as a person reads it."""
    if unit == "rad":
        return f"{math.degrees(value):.1f}°"
    return f"{100 * value:.0f} %" if unit == "fraction" else f"{1e3 * value:.1f} mm"

"""The first seconds of a run: the way from where the arm stands to where the policy wants it, slowly."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vla.robot_drivers.driver import DriverInfo

SLOWEST = 0.15
"""Share of the joints' velocity bounds at which a run begins."""


class SoftStart:
    """Limits the speed of setpoints for `seconds` after the first one.

    The bound rises in a straight line from `SLOWEST` of every joint's velocity bound to all of it; after
    `seconds` setpoints pass as they are.
    """

    def __init__(self, info: DriverInfo, seconds: float):
        self._info, self._seconds = info, seconds
        self._begin: float | None = None
        self._time = 0.0
        self._q: np.ndarray | None = None

    def limit(self, setpoint: Mapping[str, float], measured: np.ndarray, now: float) -> dict[str, float]:
        """Return what to ask for at `now` (s) on the way to `setpoint`; the way begins at `measured` (J,)."""
        if self._begin is None:
            self._begin = self._time = now
            self._q = np.array(measured, float)
        elapsed = now - self._begin
        if elapsed >= self._seconds:
            return dict(setpoint)
        share = SLOWEST + (1 - SLOWEST) * elapsed / self._seconds
        reach = share * self._info.velocity * (now - self._time)
        asked = np.array([setpoint[name] for name in self._info.joint_names])
        self._q = self._q + np.clip(asked - self._q, -reach, reach)
        self._time = now
        return dict(zip(self._info.joint_names, self._q.tolist(), strict=True))

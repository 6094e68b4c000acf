"""Receding horizon: the newest chunk replaces the plan as soon as it is there."""

from __future__ import annotations

import numpy as np

from vla.runtime.chunk_scheduling.scheduler import PlanScheduler


class RecedingHorizon(PlanScheduler):
    """Ask every `horizon` actions and execute the old chunk's tail meanwhile; switch without a transition.

    Two chunks that disagree make the arm jump where they meet; `RealTime` blends them.
    """

    def _accept(self, observed: int, actions: np.ndarray) -> None:
        self._first, self._plan = self.step, actions

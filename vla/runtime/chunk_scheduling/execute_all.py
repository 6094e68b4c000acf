"""Stop, look, act: the policy is asked when the plan is at its end."""

from __future__ import annotations

import numpy as np

from vla.runtime.chunk_scheduling.scheduler import PlanScheduler


class ExecuteAll(PlanScheduler):
    """Execute the first `horizon` actions of every chunk. The arm stands still while the policy thinks."""

    @staticmethod
    def default_horizon(chunk_size: int) -> int:
        """The whole chunk."""
        return chunk_size

    def _due(self) -> bool:
        return False

    def _accept(self, observed: int, actions: np.ndarray) -> None:
        self._first, self._plan = self.step, actions[: self.horizon]

"""Real-time chunking for a decoder that cannot be guided: the old plan fades into the new chunk.

Real-time chunking (arXiv 2506.07339) freezes the actions that go out while the policy thinks and lets the
new chunk deviate from the old one the further ahead it looks. It does so inside a flow-matching decoder. A
parallel decoder predicts all actions in one pass and has nothing to guide, so the same weights blend the two
chunks after the fact. The frozen prefix is what has been executed when the answer arrives: it is counted,
where the paper has to forecast it.
"""

from __future__ import annotations

import numpy as np

from vla.runtime.chunk_scheduling.scheduler import PlanScheduler


class RealTime(PlanScheduler):
    """Ask every `horizon` actions, execute the old plan meanwhile, blend over what both plans cover."""

    def _accept(self, observed: int, actions: np.ndarray) -> None:
        old = self._ahead()[: len(actions)]
        keep = old_plan_weights(len(old))[:, None]
        blended = actions.copy()
        if len(old):
            # old + (1 - w) (new - old), not w old + (1 - w) new: plans that agree are kept exactly.
            blended[: len(old)] = old + (1 - keep) * (actions[: len(old)] - old)
        self._first, self._plan = self.step, blended


def old_plan_weights(overlap: int) -> np.ndarray:
    """Return the old plan's weights (overlap,) in the blend, from the first step that is not frozen on.

    Equation 5 of arXiv 2506.07339: ``W_i = c_i (e^{c_i} - 1) / (e - 1)`` with ``c_i = (H - s - i) / (H - s -
    d + 1)`` for ``d <= i < H - s``, 1 before (executed) and 0 after (beyond the old plan). The overlap has
    ``n = H - s - d`` steps; its ``j``-th is ``i = d + j``, hence ``c = (n - j) / (n + 1)``.
    """
    c = (overlap - np.arange(overlap)) / (overlap + 1)
    return c * np.expm1(c) / np.expm1(1.0)

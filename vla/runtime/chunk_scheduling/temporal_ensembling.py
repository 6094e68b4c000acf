"""Temporal ensembling (ACT, arXiv 2304.13705): the mean of all that was predicted for this step."""

from __future__ import annotations

import numpy as np

from vla.runtime.chunk_scheduling.scheduler import ChunkScheduler

DECAY = 0.01
"""ACT's `m`: the oldest prediction counts most, later ones hardly less."""


class TemporalEnsembling(ChunkScheduler):
    """Ask every `horizon` actions; ``a_t = sum_i w_i A_i[t] / sum_i w_i`` with ``w_i = exp(-m i)``.

    `i` counts the chunks that cover step `t` from the oldest on.
    """

    @staticmethod
    def default_horizon(chunk_size: int) -> int:
        """Every step, as in the paper."""
        return 1

    def _clear(self) -> None:
        self._chunks: list[tuple[int, np.ndarray]] = []  # (step of the first row, rows), oldest first

    def _due(self) -> bool:
        return self.step - self._observed >= self.horizon

    def _accept(self, observed: int, actions: np.ndarray) -> None:
        self._chunks = [(first, rows) for first, rows in self._chunks if first + len(rows) > self.step]
        self._chunks.append((self.step, actions))

    def _planned(self, step: int) -> np.ndarray | None:
        predictions = [rows[step - first] for first, rows in self._chunks if step - first < len(rows)]
        if not predictions:
            return None
        weights = np.exp(-DECAY * np.arange(len(predictions)))
        return weights / weights.sum() @ np.array(predictions)

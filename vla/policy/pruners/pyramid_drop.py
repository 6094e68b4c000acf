"""PyramidDrop: at the end of each stage the least attended vision tokens are dropped for good."""

from __future__ import annotations

from torch import nn

from vla.policy.pruners.pruner import (
    Budget,
    LayerInput,
    Pruner,
    Selection,
    among,
    attention_scores,
    staged_counts,
)
from vla.policy.routing import select_top_k

STAGES = 4
"""Stages of equal depth (arXiv 2410.17247)."""


class PyramidDrop(Pruner):
    """Training-free; the score is the attention of the stage's first layer, RoPE included."""

    def __init__(self, hidden_size: int, budget: Budget):
        super().__init__()
        layers = len(budget.counts)
        self.starts = tuple(sorted({layers * stage // STAGES for stage in range(1, STAGES)} - {0}))
        self.counts = staged_counts(budget, self.starts)

    def select(
        self, index: int, layer: nn.Module, given: LayerInput, previous: Selection | None
    ) -> Selection:
        """Rank what is left at the start of a stage; keep it until the next."""
        if index not in self.starts:
            return previous
        left = None if previous is None else previous.vision(given.layout)
        scores = among(left, attention_scores(layer, given, rotate=True))
        return Selection.of(given.x, given.layout.span, select_top_k(scores, self.counts[index]))

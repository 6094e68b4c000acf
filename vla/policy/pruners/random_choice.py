"""Random pruning at LFP's schedule: what any score must beat."""

from __future__ import annotations

import torch
from torch import nn

from vla.policy.pruners.pruner import Budget, LayerInput, Pruner, Selection
from vla.policy.routing import select_top_k

SEED = 0
"""The choice is part of the model: the same in every run, for every sample."""


class RandomChoice(Pruner):
    """Each layer computes on its own fixed random subset."""

    def __init__(self, hidden_size: int, budget: Budget):
        super().__init__()
        self.counts = budget.counts
        generator = torch.Generator("cpu").manual_seed(SEED)
        scores = torch.rand(len(budget.counts), budget.tokens, generator=generator, device="cpu")
        self.register_buffer("scores", scores, persistent=False)

    def select(
        self, index: int, layer: nn.Module, given: LayerInput, previous: Selection | None
    ) -> Selection:
        """The same tokens whatever is seen."""
        kept = select_top_k(self.scores[index, None], self.counts[index])
        return Selection.of(given.x, given.layout.span, kept.expand(len(given.x), -1))

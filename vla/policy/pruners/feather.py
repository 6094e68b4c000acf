"""FEATHER: a score without position bias and a uniform sample, in two stages (arXiv 2412.13180)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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


class Feather(Pruner):
    """Training-free. Scores leave RoPE out, whose decay favours what stands last in the sequence.

    The early stage, at a quarter of the depth, keeps a grid sample of every camera and fills up by score;
    the late stage, at half the depth, keeps by score alone.
    """

    def __init__(self, hidden_size: int, budget: Budget):
        super().__init__()
        layers = len(budget.counts)
        self.starts = (max(1, layers // 4), max(2, layers // 2))
        self.counts = staged_counts(budget, self.starts)
        sampled = uniform_sample(budget.grid, self.counts[min(self.starts[0], layers - 1)] // 2)
        self.register_buffer("sampled", sampled, persistent=False)

    def select(
        self, index: int, layer: nn.Module, given: LayerInput, previous: Selection | None
    ) -> Selection:
        """Rank what is left at the start of a stage; keep it until the next."""
        if index not in self.starts:
            return previous
        scores = attention_scores(layer, given, rotate=False)
        if index == self.starts[0]:
            scores = scores.masked_fill(self.sampled, torch.inf)
        left = None if previous is None else previous.vision(given.layout)
        kept = select_top_k(among(left, scores), self.counts[index])
        return Selection.of(given.x, given.layout.span, kept)


def uniform_sample(grid: tuple[int, int, int], most: int) -> Tensor:
    """Return which tokens (V,) of `grid` = (cameras, rows, columns) lie on every `stride`-th row and column.

    The stride is the smallest, from 2 on, that samples at most `most` tokens.
    """
    cameras, rows, columns = grid
    for stride in range(2, max(rows, columns) + 2):
        if cameras * -(-rows // stride) * -(-columns // stride) <= most:
            on_grid = (torch.arange(rows)[:, None] % stride == 0) & (torch.arange(columns) % stride == 0)
            return on_grid.flatten().repeat(cameras)
    return torch.zeros(cameras * rows * columns, dtype=torch.bool)

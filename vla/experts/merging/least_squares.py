"""Least squares under task masks: the update and masks that lose least of the task vectors.

Task masks let a task use an entry of ``τ_merge`` or not. The other methods merge first and mask then; this
one minimises what is lost with the masks in place,

    min over τ_merge and S_m in {0, 1}:  Σ_m ‖τ_m − S_m ⊙ τ_merge‖²

which falls into one small problem per entry and is solved exactly. Not from a paper: for a given ``τ_merge``
its masks are TALL-masks' (arXiv 2405.07813) at λ = 1; the equation for ``τ_merge`` is what is added.

With ``bits: 2`` the masks are in {-1, 0, 1, 2}: experts that pull an entry in opposite directions, of whom
otherwise one gets nothing, or differ in how far they pull, share it. Of four unrelated Gaussian updates one
bit loses 24 % of the squares, two bits 4 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vla.errors import UserError
from vla.experts.low_rank import LowRank
from vla.experts.merging.method import MergeMethod, TensorContext
from vla.experts.task_masks import blocks, task_mask

#: What a task may multiply an entry of ``τ_merge`` by, for so many bits per weight.
LEVELS = {1: (0, 1), 2: (-1, 0, 1, 2)}
_ENTRIES_AT_A_TIME = 2**15


def least_squares(deltas: Sequence[Tensor], levels: Sequence[int] = LEVELS[1]) -> Tensor:
    """``τ_merge`` (m, n) of M updates (m, n), a few entries at a time, which bounds the working memory."""
    # Contiguous whatever the updates are: its blocks are to be views.
    merged = torch.empty(deltas[0].shape, dtype=deltas[0].dtype, device=deltas[0].device)
    for out, *values in blocks(merged, *deltas, size=_ENTRIES_AT_A_TIME):
        out.copy_(best_entries(torch.stack(values), levels))
    return merged


def best_entries(values: Tensor, levels: Sequence[int] = LEVELS[1]) -> Tensor:
    """``argmin_d Σ_m min_c (τ_m − c d)²`` over the levels c, for every entry of `values` (M, ...).

    Of two that are as good, the one with the sign of ``Σ τ_m``: alone, a task gets its own value.
    """
    up, gain = _best_positive(values, levels)
    down, gain_down = _best_positive(-values, levels)
    negative = torch.where(gain_down == gain, values.sum(dim=0) < 0, gain_down > gain)
    return torch.where(negative, -down, up)


def _best_positive(values: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The best ``d >= 0`` and its gain ``(Σ c τ)² / Σ c²``, by which it lowers ``Σ τ²``.

    As d grows from 0, every task steps down from its largest level to 0. Between two steps of any task the
    levels are fixed, and ``d = Σ c τ / Σ c²`` is best for them: so one candidate per step is tried, and the
    sums are those of all steps that are still ahead.
    """
    at, along, squares = _steps(values, levels)
    best, most = torch.zeros_like(values[0]), torch.zeros_like(values[0])
    for here in at:
        ahead = at >= here
        numerator = torch.where(ahead, along, 0).sum(dim=0)
        denominator = torch.where(ahead, squares, 0).sum(dim=0)
        gain = numerator.square() / denominator  # NaN, which is never better, where nothing is ahead
        better = gain >= most  # of two that are as good the larger d, with smaller levels
        best = torch.where(better, numerator / denominator, best)
        most = torch.where(better, gain, most)
    return best, most


def _steps(values: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """At which d each task takes the level below, and by how much ``Σ c τ`` and ``Σ c²`` fall: (steps, ...).

    From level c to c' at ``d = 2 |τ| / (c + c')``, where both are as far from τ; never (∞) if a task has
    fewer levels of its sign than others. Steps to smaller levels come later.
    """
    size = values.abs()
    up, down = ([0, *sorted(c * sign for c in levels if c * sign > 0)] for sign in (1, -1))
    at, along, squares = [], [], []
    for i in reversed(range(1, max(len(up), len(down)))):
        level, lower = (
            torch.where(values > 0, *(float(ladder[min(k, len(ladder) - 1)]) for ladder in (up, down)))
            for k in (i, i - 1)
        )
        taken = (level > lower) & (size > 0)
        at.append(torch.where(taken, 2 * size / (level + lower), torch.inf))
        along.append((level - lower) * size)
        squares.append(torch.where(taken, level.square() - lower.square(), 0))
    return torch.cat(at), torch.cat(along), torch.cat(squares)


@dataclass(frozen=True)
class LeastSquares(MergeMethod):
    """See the module's equation. One expert is the identity; for use with its masks."""

    own_masks: ClassVar[bool] = True
    bits: int = 1

    def __post_init__(self):
        if self.bits not in LEVELS:
            raise UserError(f"The option bits is {self.bits}; it must be {' or '.join(map(str, LEVELS))}.")

    @property
    def signed(self) -> bool:
        """With two bits."""
        return self.bits == 2

    def merge(self, updates: Sequence[LowRank], context: TensorContext) -> Tensor:
        """See `least_squares`."""
        return least_squares([update.dense() for update in updates], LEVELS[self.bits])

    def mask(self, delta: Tensor, merged: Tensor) -> Tensor:
        """Where 1 is nearer to ``τ_m / τ_merge`` than 0, which is the λ rule at λ = 1: levels 1 and 2."""
        return task_mask(delta, merged, 1.0)

    def negated(self, delta: Tensor, merged: Tensor) -> Tensor:
        """Where -1 is nearer than 0, or 2 nearer than 1: levels -1 and 2."""
        return task_mask(delta, -merged, 1.0) | task_mask(delta - merged, merged, 1.0)

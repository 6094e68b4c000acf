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
_ENTRIES_AT_A_TIME = 2**14


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
    tied = (gain_down == gain) & (values.sum(dim=0) < 0)
    return _either(up, -down, (gain_down > gain) | tied)


def _best_positive(values: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The best ``d >= 0`` and its gain ``(Σ c τ)² / Σ c²``, by which it lowers ``Σ τ²``.

    As d grows from 0, every task steps down from its largest level to 0. Between two steps of any task the
    levels are fixed, and ``d = Σ c τ / Σ c²`` is best for them: so one candidate per step is tried, and the
    sums are those of all steps that are still ahead.
    """
    at, along, squares = _steps(values, levels)
    best, most = torch.zeros_like(values[0]), torch.zeros_like(values[0])
    ahead = torch.empty_like(at)
    for here in at:
        torch.ge(at, here, out=ahead)
        numerator = (along * ahead).sum(dim=0)
        denominator = (squares * ahead).sum(dim=0).clamp_(min=1)  # whole numbers; 0 where nothing is ahead
        gain = numerator.square() / denominator
        # Of two that are as good the larger d, with smaller levels.
        best = _either(best, numerator / denominator, gain >= most)
        most = torch.maximum(most, gain)
    return best, most


def _steps(values: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """At which d each task takes the level below, and by how much ``Σ c τ`` and ``Σ c²`` fall: (steps, ...).

    From level c to c' at ``d = 2 |τ| / (c + c')``, where both are as far from τ; never (∞, or NaN for
    ``τ = 0``) if a task has fewer levels of its sign than others. Steps to smaller levels come later.
    """
    size, positive = values.abs(), values > 0
    up, down = ([0, *sorted(c * sign for c in levels if c * sign > 0)] for sign in (1, -1))
    at, along, squares = [], [], []
    for i in reversed(range(1, max(len(up), len(down)))):
        (c, c_below), (n, n_below) = (
            (ladder[i], ladder[i - 1]) if i < len(ladder) else (0, 0) for ladder in (up, down)
        )
        at.append(2 * size / _by_sign(positive, c + c_below, n + n_below))
        along.append(_by_sign(positive, c - c_below, n - n_below) * size)
        squares.append(_by_sign(positive, c**2 - c_below**2, n**2 - n_below**2))
    return torch.cat(at), torch.cat(along), torch.cat(squares)


def _either(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """`second` where `mask` is set, else `first`, both finite; why without `torch.where`: `kept_entries`."""
    return torch.lerp(first, second, mask.view(torch.uint8).to(first.dtype))


def _by_sign(positive: Tensor, one: int, other: int) -> Tensor:
    """The number `one` where `positive`, else `other`, in float32."""
    return positive.view(torch.uint8).float().mul_(one - other).add_(other)


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
        turned = torch.empty(delta.shape, dtype=torch.bool, device=delta.device)
        for out, own, whole in blocks(turned, delta, merged):
            torch.logical_or(task_mask(own, -whole, 1.0), task_mask(own - whole, whole, 1.0), out=out)
        return turned

"""Least squares under task masks: the update and masks that lose least of the task vectors.

Task masks let a task use an entry of ``τ_merge`` or not. The other methods merge first and mask then; this
one minimises what is lost with the masks in place,

    min over τ_merge and S_m in {0, 1}:  Σ_m ‖τ_m − S_m ⊙ τ_merge‖²

which falls into one small problem per entry and is solved exactly. Not from a paper: for a given ``τ_merge``
its masks are TALL-masks' (arXiv 2405.07813) at λ = 1; the equation for ``τ_merge`` is what is added.

With ``signs: true`` the masks are in {-1, 0, 1}, two bits per weight and task: experts that pull an entry in
opposite directions, of whom otherwise one gets nothing, share its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vla.experts.low_rank import LowRank
from vla.experts.merging.method import MergeMethod, TensorContext
from vla.experts.task_masks import task_mask

_ENTRIES_AT_A_TIME = 2**18


def least_squares(deltas: Sequence[Tensor]) -> Tensor:
    """``τ_merge`` (m, n) of M updates (m, n), a few rows at a time, which bounds the working memory."""
    merged = torch.empty_like(deltas[0])
    rows = max(1, _ENTRIES_AT_A_TIME // max(1, merged.shape[1]))
    for start in range(0, len(merged), rows):
        part = slice(start, start + rows)
        merged[part] = best_entries(torch.stack([delta[part] for delta in deltas]))
    return merged


def best_entries(values: Tensor) -> Tensor:
    """``argmin_d Σ_m min(τ_m², (τ_m − d)²)`` for every entry of `values` (M, ...).

    The tasks that use the best d are those whose value is nearer to d than to 0: the k largest of one sign,
    for some k; and d is their mean. So the 2M means of the k largest and of the k smallest are tried.
    """
    best, least = torch.zeros_like(values[0]), values.square().sum(dim=0)
    for sign in (1, -1):
        sums = (values * sign).clamp_(min=0).sort(dim=0, descending=True).values.cumsum_(dim=0)
        for k, total in enumerate(sums, 1):
            candidate = total * (sign / k)
            lost = torch.minimum(values.square(), (values - candidate).square_()).sum(dim=0)
            best = torch.where(lost < least, candidate, best)
            least = torch.minimum(least, lost)
    return best


@dataclass(frozen=True)
class LeastSquares(MergeMethod):
    """See the module's equation. One expert is the identity; for use with its masks."""

    own_masks: ClassVar[bool] = True
    signs: bool = False

    @property
    def signed(self) -> bool:
        """As `signs` says."""
        return self.signs

    def merge(self, updates: Sequence[LowRank], context: TensorContext) -> Tensor:
        """See `least_squares`; with `signs` of the magnitudes, the sign being that of the updates' sum."""
        deltas = [update.dense() for update in updates]
        if not self.signs:
            return least_squares(deltas)
        sign = torch.where(sum(deltas) < 0, -1.0, 1.0)
        return least_squares([delta.abs_() for delta in deltas]).mul_(sign)

    def mask(self, delta: Tensor, merged: Tensor) -> Tensor:
        """``S_m = 1[(τ_m − τ_merge)² < τ_m²]``, which is the λ rule at λ = 1."""
        return task_mask(delta, merged, 1.0)

    def negated(self, delta: Tensor, merged: Tensor) -> Tensor:
        """``1[(τ_m + τ_merge)² < τ_m²]``; never where `mask` is."""
        return task_mask(delta, -merged, 1.0)

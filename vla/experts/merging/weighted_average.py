"""Weighted average of the experts' weights (model soups, Wortsman et al., arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vla.errors import UserError
from vla.experts.low_rank import LowRank
from vla.experts.merging.method import MergeMethod, TensorContext
from vla.experts.merging.task_arithmetic import task_arithmetic


def weighted_average(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """``Σ_m w_m x_m / Σ_m w_m``: of weights, or of their updates, which is the same up to the common base.

    Raises `UserError` if the weights sum to zero.
    """
    total = sum(weights)
    if total == 0:
        raise UserError("The experts' weights sum to zero, so there is no average; change them.")
    return task_arithmetic(tensors, [weight / total for weight in weights])


@dataclass(frozen=True)
class WeightedAverage(MergeMethod):
    """``Θ = Σ w_m Θ_m / Σ w_m``, that is ``τ_merge = Σ w_m τ_m / Σ w_m``. One expert is the identity."""

    takes_weights: ClassVar[bool] = True

    def merge(self, updates: Sequence[LowRank], context: TensorContext) -> Tensor:
        """See `weighted_average`."""
        return weighted_average((update.dense() for update in updates), context.weights)

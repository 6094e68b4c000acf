"""Task arithmetic (Ilharco et al., arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vla.experts.low_rank import LowRank
from vla.experts.merging.method import MergeMethod, TensorContext


def task_arithmetic(deltas: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """``τ_merge = Σ_m w_m τ_m``; `deltas` may be a generator, one is held at a time."""
    total = None
    for delta, weight in zip(deltas, weights, strict=True):
        total = delta * weight if total is None else total.add_(delta, alpha=weight)
    return total


@dataclass(frozen=True)
class TaskArithmetic(MergeMethod):
    """``τ_merge = Σ_m w_m τ_m``. One expert of weight 1 is the identity."""

    takes_weights: ClassVar[bool] = True

    def merge(self, updates: Sequence[LowRank], context: TensorContext) -> Tensor:
        """See `task_arithmetic`."""
        return task_arithmetic((update.dense() for update in updates), context.weights)

"""DARE: drop and rescale (Yu et al., arXiv 2311.03099)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vla.experts.low_rank import LowRank
from vla.experts.merging.method import MergeMethod, TensorContext, require_choice, require_fraction
from vla.experts.merging.task_arithmetic import task_arithmetic
from vla.experts.merging.ties import ties
from vla.experts.task_masks import blocks, kept_entries


def drop_and_rescale(delta: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """``τ̃ = b ⊙ τ / (1 − p)`` with ``b ~ Bernoulli(1 − p)`` per entry, so that ``E[τ̃] = τ``.

    `generator` lives on the CPU, whatever holds `delta`, so that a seed means the same everywhere.
    """
    if drop == 0:
        return delta
    survived = torch.empty(delta.shape, dtype=delta.dtype, device=delta.device)
    for out, own in blocks(survived, delta):
        kept = torch.rand(own.shape, generator=generator) >= drop
        out.copy_(kept_entries(own / (1 - drop), kept.to(own.device)))
    return survived


@dataclass(frozen=True)
class Dare(MergeMethod):
    """DARE, then task arithmetic (``then: linear``) or TIES without trimming (``then: ties``).

    `drop` is the paper's p. One expert is the identity at ``drop: 0`` only.
    """

    takes_weights: ClassVar[bool] = True
    drop: float = 0.5
    then: str = "linear"

    def __post_init__(self):
        require_fraction("drop", self.drop, zero=True)
        require_choice("then", self.then, ("linear", "ties"))

    def merge(self, updates: Sequence[LowRank], context: TensorContext) -> Tensor:
        """See `drop_and_rescale`, `task_arithmetic` and `ties`."""
        deltas = (
            drop_and_rescale(update.dense(), self.drop, context.generator(expert))
            for update, expert in zip(updates, context.experts, strict=True)
        )
        if self.then == "linear":
            return task_arithmetic(deltas, context.weights)
        return ties(list(deltas), context.weights, [0.0] * len(updates))

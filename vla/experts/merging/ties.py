"""TIES: trim, elect sign, merge what agrees (Yadav et al., arXiv 2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vla.experts.low_rank import LowRank
from vla.experts.merging.magnitude import MagnitudeSurvey, magnitude_threshold
from vla.experts.merging.method import MergeMethod, TensorContext, require_choice, require_fraction
from vla.experts.task_masks import blocks, kept_entries


def ties(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    thresholds: Sequence[float],
    combine: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Merge M updates of one shape; `thresholds` are the trimming magnitudes, one per expert (0: keep all).

    Trim: ``τ̂_m = τ_m · 1[|τ_m| >= t_m]``. Elect: ``γ = sgn(Σ_m τ̂_m)``. Merge over the agreeing entries
    ``A = {m : sgn(τ̂_m) = γ}``: ``Σ_A w_m τ̂_m / |A|`` (``mean``, the paper) or ``Σ_A w_m τ̂_m`` (``sum``,
    MergeVLA's code). Weights enter after the election and entries that cancel to the last bit elect plus,
    both as in PEFT.
    """
    merged = torch.zeros(deltas[0].shape, dtype=deltas[0].dtype, device=deltas[0].device)
    for total, *values in blocks(merged, *deltas):
        trimmed = [kept_entries(v, v.abs() >= t) for v, t in zip(values, thresholds, strict=True)]
        positive = sum(trimmed) >= 0
        agreeing = torch.zeros_like(total)
        for delta, weight in zip(trimmed, weights, strict=True):
            agrees = (delta != 0) & ((delta > 0) == positive)
            total += kept_entries(delta, agrees) * weight
            agreeing += agrees
        if combine == "mean":
            total /= agreeing.clamp_(min=1)
    return merged


@dataclass(frozen=True)
class Ties(MergeMethod):
    """TIES. One expert is the identity at ``density: 1``; MergeVLA ran ``density: 1, combine: sum``.

    `density` is the fraction of each task vector that survives the trimming: of all its tensors together
    (``trim: global``, the paper) or of each tensor (``trim: tensor``, PEFT).
    """

    takes_weights: ClassVar[bool] = True
    density: float = 0.2
    combine: str = "mean"
    trim: str = "global"

    def __post_init__(self):
        require_fraction("density", self.density, zero=False)
        require_choice("combine", self.combine, ("mean", "sum"))
        require_choice("trim", self.trim, ("global", "tensor"))

    def start_survey(self, experts: int) -> MagnitudeSurvey | None:
        """Find the global thresholds."""
        return MagnitudeSurvey(experts, self.density) if self.trim == "global" else None

    def merge(self, updates: Sequence[LowRank], context: TensorContext) -> Tensor:
        """See `ties`."""
        deltas = [update.dense() for update in updates]
        if self.trim == "global":
            thresholds: Sequence[float] = context.survey.thresholds
        else:
            thresholds = [magnitude_threshold(delta, self.density) for delta in deltas]
        return ties(deltas, context.weights, thresholds, self.combine)

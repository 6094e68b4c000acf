"""Iso-C: a merged update with a flat spectrum (Marczak et al., arXiv 2502.04959)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vla.experts.low_rank import LowRank, stack
from vla.experts.merging.method import MergeMethod, TensorContext


def iso_c(updates: Sequence[LowRank]) -> Tensor:
    """``Σ_m τ_m = U Σ V``; ``τ_merge = σ̄ U V`` with ``σ̄`` the mean singular value.

    Mean and product run over the non-zero singular values. The paper has full-rank updates; with LoRA the
    remaining directions of an (m, n) matrix are arbitrary and must not receive weight.
    """
    u, s, v = stack(updates).svd()
    return u @ v * s.mean() if len(s) else u @ v


@dataclass(frozen=True)
class IsoC(MergeMethod):
    """Iso-C. One expert is *not* the identity: its spectrum is flattened too."""

    def merge(self, updates: Sequence[LowRank], context: TensorContext) -> Tensor:
        """See `iso_c`."""
        return iso_c(updates)

"""TSV-M: task singular vectors, decorrelated (Gargiulo et al., arXiv 2412.00081)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vla.experts.low_rank import LowRank, nonzero
from vla.experts.merging.method import MergeMethod, TensorContext


def tsv_m(updates: Sequence[LowRank]) -> Tensor:
    """Merge M updates of an (m, n) matrix.

    ``τ_m = U_m Σ_m V_m``; keep ``k = min(rank τ_m, ⌊min(m, n)/M⌋)`` directions of each; concatenate to
    ``U, Σ, V``; replace U and V by their polar factors, the nearest orthonormal sets; ``τ = U_⊥ Σ V_⊥``.

    The decompositions come from QR of the factors. The published code decomposes folded bf16 weights and
    keeps ``⌊min(m, n)/M⌋`` directions even of a lower-rank update, so it orthogonalises quantisation noise.
    """
    share = min(updates[0].shape) // len(updates)
    parts = [update.svd() for update in updates]
    u = polar(torch.cat([part.u[:, :share] for part in parts], dim=1))
    v = polar(torch.cat([part.v[:share] for part in parts]))
    return (u * torch.cat([part.s[:share] for part in parts])) @ v


def polar(x: Tensor) -> Tensor:
    """``P Qᵀ`` of ``x = P D Qᵀ`` over the non-zero D: unique even if experts share a direction."""
    p, _, q = nonzero(*torch.linalg.svd(x, full_matrices=False), size=max(x.shape))
    return p @ q


@dataclass(frozen=True)
class TsvM(MergeMethod):
    """TSV-M. One expert is the identity; the rank left to each of M experts is at most ``⌊min(m, n)/M⌋``."""

    def merge(self, updates: Sequence[LowRank], context: TensorContext) -> Tensor:
        """See `tsv_m`."""
        return tsv_m(updates)

"""KnOTS: align the experts in one singular basis, merge there (Stoica et al., arXiv 2410.19735)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vla.experts.low_rank import LowRank, nonzero
from vla.experts.merging.magnitude import magnitude_threshold
from vla.experts.merging.method import MergeMethod, TensorContext, require_choice, require_fraction
from vla.experts.merging.ties import ties


def joint_basis(updates: Sequence[LowRank]) -> tuple[Tensor, list[Tensor]]:
    """Return ``U Σ`` (m, K) and the blocks ``V_m`` (K, n) of ``[τ_1 … τ_M] = U Σ [V_1 … V_M]``.

    Exact in factor space: with ``[B_1 … B_M] = Q R`` and ``A_mᵀ = Q_m R_m`` the wide matrix is
    ``Q [R_(1) R_1ᵀ … R_(M) R_Mᵀ] diag(Q_1ᵀ … Q_Mᵀ)``, and only the small core in the middle is decomposed.
    """
    q, r = torch.linalg.qr(torch.cat([update.b for update in updates], dim=1))
    right = [torch.linalg.qr(update.a.T) for update in updates]
    slices = r.split([update.rank for update in updates], dim=1)
    core = torch.cat([part @ r_m.T for part, (_, r_m) in zip(slices, right, strict=True)], dim=1)
    u, s, v = nonzero(*torch.linalg.svd(core, full_matrices=False), size=max(updates[0].shape))
    blocks = v.split([q_m.shape[1] for q_m, _ in right], dim=1)
    return (q @ u) * s, [block @ q_m.T for block, (q_m, _) in zip(blocks, right, strict=True)]


@dataclass(frozen=True)
class Knots(MergeMethod):
    """``τ_merge = U Σ merge(V_1, …, V_M)``. One expert is the identity with sum, or at density 1.

    ``combine: ties`` trims each ``V_m`` to `density`, elects and averages, as the paper's best variant does.
    ``combine: sum``, MergeVLA's, is algebraically task arithmetic: ``U Σ Σ_m V_m = Σ_m τ_m``.
    """

    combine: str = "ties"
    density: float = 0.3

    def __post_init__(self):
        require_choice("combine", self.combine, ("ties", "sum"))
        require_fraction("density", self.density, zero=False)

    def merge(self, updates: Sequence[LowRank], context: TensorContext) -> Tensor:
        """See `joint_basis` and `ties`."""
        basis, blocks = joint_basis(updates)
        if self.combine == "sum":
            return basis @ torch.stack(blocks).sum(dim=0)
        if not blocks[0].numel():
            return basis @ blocks[0]
        thresholds = [magnitude_threshold(block, self.density) for block in blocks]
        return basis @ ties(blocks, context.weights, thresholds)

"""A task vector in factor space, ``τ = B A``: exact algebra without ever folding it into weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Svd(NamedTuple):
    """Thin decomposition ``U diag(s) V`` with `u` (m, k), `s` (k,) descending and positive, `v` (k, n)."""

    u: Tensor
    s: Tensor
    v: Tensor


@dataclass(frozen=True)
class LowRank:
    """The matrix ``τ = b a`` with `b` (m, r) and `a` (r, n), both float32; LoRA's scale is inside `b`.

    Rank 0 is allowed and is the zero matrix: an expert that left this tensor alone.
    """

    b: Tensor
    a: Tensor

    @classmethod
    def zero(cls, shape: Sequence[int]) -> LowRank:
        """The update of an expert that did not touch a matrix of `shape` (m, n)."""
        return cls(torch.zeros(shape[0], 0), torch.zeros(0, shape[1]))

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), as the matrix."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """Number of columns of `b`: an upper bound of the matrix' rank."""
        return self.b.shape[1]

    def dense(self) -> Tensor:
        """The matrix, (m, n), computed once: not to be written to."""
        return self._dense

    @cached_property
    def _dense(self) -> Tensor:
        return self.b @ self.a

    def svd(self) -> Svd:
        """Decompose exactly in O((m+n)r²), without the m×n matrix; numerically zero directions are left out.

        ``B = Q_B R_B``, ``Aᵀ = Q_A R_A``, ``R_B R_Aᵀ = U' s V'``, so ``B A = (Q_B U') s (V' Q_Aᵀ)``.
        """
        q_b, r_b = torch.linalg.qr(self.b)
        q_a, r_a = torch.linalg.qr(self.a.T)
        core = nonzero(*torch.linalg.svd(r_b @ r_a.T, full_matrices=False), size=max(self.shape))
        return Svd(q_b @ core.u, core.s, core.v @ q_a.T)


def stack(updates: Sequence[LowRank]) -> LowRank:
    """The sum ``Σ τ_m`` in factor space: ``[B_1 … B_M] [A_1; …; A_M]``."""
    return LowRank(
        torch.cat([update.b for update in updates], dim=1), torch.cat([update.a for update in updates])
    )


def nonzero(u: Tensor, s: Tensor, v: Tensor, size: int) -> Svd:
    """Drop the directions that are zero up to rounding: ``s <= eps · size · max(s)``."""
    kept = s > torch.finfo(s.dtype).eps * size * s.amax() if len(s) else s > 0
    return Svd(u[:, kept], s[kept], v[kept])

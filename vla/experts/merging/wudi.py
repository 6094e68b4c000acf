"""WUDI: least interference in each expert's own row space (Cheng et al., arXiv 2503.08099)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vla.errors import UserError
from vla.experts.low_rank import LowRank, stack
from vla.experts.merging.method import MergeMethod, TensorContext, require_choice

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Adam's own defaults."""


@dataclass(frozen=True)
class Interference:
    """``L(X) = Σ_m ‖(Σ_k τ_k + X − τ_m) τ_mᵀ‖²_F / ‖τ_m‖²_F`` as a function of the correction X, in factors.

    With ``S_m = B_mᵀB_m / ‖τ_m‖²``, the gradient is ``2 (X Aᵀ S + P) A`` for the stacked `a` (R, n), the
    block diagonal `s` (R, R) and ``P_m = (Σ_{k≠m} τ_k) A_mᵀ S_m``, `p` (m, R). Starting from X, and not from
    τ, makes the gradient of a single expert exactly zero.
    """

    a: Tensor
    s: Tensor
    p: Tensor

    @classmethod
    def of(cls, updates: Sequence[LowRank], dtype: torch.dtype = torch.float32) -> Interference:
        """Build the terms from at least one non-zero update, in `dtype`."""
        blocks, pulls = [], []
        updates = [LowRank(update.b.to(dtype), update.a.to(dtype)) for update in updates]
        for m, update in enumerate(updates):
            gram = update.b.T @ update.b
            norm = (gram * (update.a @ update.a.T)).sum()
            blocks.append(gram / norm)
            others = [other for k, other in enumerate(updates) if k != m]
            if others:
                rest = stack(others)
                pulls.append(rest.b @ (rest.a @ update.a.T) @ blocks[-1])
            else:
                pulls.append(torch.zeros_like(update.b))
        a = torch.cat([update.a for update in updates])
        return cls(a, torch.block_diag(*blocks), torch.cat(pulls, dim=1))

    def gradient(self, x: Tensor) -> Tensor:
        """``∂L/∂X``, (m, n)."""
        return 2 * (x @ self.a.T @ self.s + self.p) @ self.a

    def minimiser(self) -> Tensor:
        """The X of least norm at the minimum: ``−P A H⁺`` with ``H = Aᵀ S A``, in the span of A's rows."""
        q, r = torch.linalg.qr(self.a.T)
        inner = torch.linalg.pinv(r @ self.s @ r.T, hermitian=True, rtol=1e-10)
        return -(self.p @ r.T) @ inner @ q.T


def wudi(updates: Sequence[LowRank], steps: int, learning_rate: float) -> Tensor:
    """Start at ``Σ_m τ_m`` and take `steps` of Adam on the interference ``L``, in float32.

    Adam (Kingma and Ba 2015, algorithm 1) is written out: making torch's optimizer loads torch's compiler,
    116 MB (torch 2.11), which a streamed merge cannot spare.
    """
    total = stack(updates).dense()
    present = [update for update in updates if update.b.any() and update.a.any()]
    if not present:
        return total
    interference = Interference.of(present)
    x, mean, square = (torch.zeros_like(total) for _ in range(3))
    for step in range(1, steps + 1):
        gradient = interference.gradient(x)
        mean.lerp_(gradient, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        scale = (square / (1 - BETAS[1] ** step)).sqrt_().add_(EPSILON)
        x.addcdiv_(mean, scale, value=-learning_rate / (1 - BETAS[0] ** step))
        del gradient, scale  # each is as large as the layer
    return total.add_(x)


def wudi_exact(updates: Sequence[LowRank]) -> Tensor:
    """The minimum of ``L`` that is nearest to ``Σ_m τ_m``: where gradient descent from there would end."""
    present = [update for update in updates if update.b.any() and update.a.any()]
    total = stack(updates).dense()
    # The normal equations square the condition number, hence float64.
    return total + Interference.of(present, torch.float64).minimiser().float() if present else total


@dataclass(frozen=True)
class Wudi(MergeMethod):
    """WUDI. One expert is the identity.

    ``solver: adam`` is the published method, whose few small steps stop far from the minimum when updates
    are large against ``steps · learning_rate``; ``solver: exact`` goes to the minimum in closed form.
    """

    solver: str = "adam"
    steps: int = 300
    learning_rate: float = 1e-5

    def __post_init__(self):
        require_choice("solver", self.solver, ("adam", "exact"))
        if self.steps < 1 or self.learning_rate <= 0:
            raise UserError("WUDI needs at least one step and a positive learning rate.")

    def merge(self, updates: Sequence[LowRank], context: TensorContext) -> Tensor:
        """See `wudi` and `wudi_exact`."""
        if self.solver == "exact":
            return wudi_exact(updates)
        return wudi(updates, self.steps, self.learning_rate)

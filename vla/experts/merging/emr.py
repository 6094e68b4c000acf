"""EMR: elect one task vector, mask and rescale it per task (Huang et al., arXiv 2405.17461)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vla.experts.low_rank import LowRank
from vla.experts.merging.method import MergeMethod, TensorContext
from vla.experts.task_masks import blocks


def emr(deltas: Sequence[Tensor]) -> Tensor:
    """The elected vector ``τ_uni = γ ⊙ max_m (γ ⊙ τ_m)₊`` with ``γ = sgn(Σ_m τ_m)``."""
    elected = torch.zeros(deltas[0].shape, dtype=deltas[0].dtype, device=deltas[0].device)
    for largest, *values in blocks(elected, *deltas):
        sign = sum(values).sign_()
        for value in values:
            torch.maximum(largest, value * sign, out=largest)
        largest *= sign
    return elected


@dataclass(frozen=True)
class Emr(MergeMethod):
    """EMR, tuning-free. One expert is the identity.

    The task's weights are ``Θ_0 + γ_m S_m ⊙ τ_uni`` with ``S_m = 1[τ_m · τ_uni > 0]`` and the rescaler
    ``γ_m = Σ|τ_m| / Σ|S_m ⊙ τ_uni|``, sums over all tensors.
    """

    own_masks: ClassVar[bool] = True
    own_scale: ClassVar[bool] = True

    def merge(self, updates: Sequence[LowRank], context: TensorContext) -> Tensor:
        """See `emr`."""
        return emr([update.dense() for update in updates])

    def mask(self, delta: Tensor, merged: Tensor) -> Tensor:
        """``S_m = 1[τ_m · τ_uni > 0]``."""
        used = torch.empty(delta.shape, dtype=torch.bool, device=delta.device)
        for out, own, elected in blocks(used, delta, merged):
            torch.gt(own.sign() * elected.sign(), 0, out=out)
        return used

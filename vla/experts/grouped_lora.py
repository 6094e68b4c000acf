"""Grouped LoRA: one linear layer, one batch, and every row's own expert.

``y_i = W x_i + B_{e(i)} A_{e(i)} x_i``. The base's product is shared by the whole batch; the low-rank terms
are two batched products over factors that lie stacked along an expert axis (the idea of Punica,
arXiv 2310.18547, and S-LoRA, 2311.03285). Smaller ranks are padded with zeros, which add nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.experts.low_rank import LowRank


@dataclass(frozen=True)
class FactorStack:
    """The factors of E experts on one (m, n) layer: `a` (E, r, n) and `b` (E, m, r), r the largest rank.

    LoRA's scale is inside `b`. `ranks` holds each expert's own rank; 0 is an expert that left the layer
    alone.
    """

    a: Tensor
    b: Tensor
    ranks: tuple[int, ...]

    @classmethod
    def empty(cls, experts: int, like: Tensor) -> FactorStack:
        """`experts` of rank 0 on a layer whose weights are `like` (m, n), in its dtype and on its device."""
        m, n = like.shape
        return cls(like.new_zeros(experts, 0, n), like.new_zeros(experts, m, 0), (0,) * experts)

    def with_update(self, update: LowRank) -> FactorStack:
        """The stack with one more expert at its end."""
        rank = max(self.a.shape[1], update.rank)
        a = [_pad(self.a, 1, rank), _pad(update.a[None].to(self.a), 1, rank)]
        b = [_pad(self.b, 2, rank), _pad(update.b[None].to(self.b), 2, rank)]
        return FactorStack(torch.cat(a), torch.cat(b), (*self.ranks, update.rank))

    def without(self, expert: int) -> FactorStack:
        """The stack without the expert of that index, no wider than the others need."""
        others = [e for e in range(len(self.ranks)) if e != expert]
        ranks = tuple(self.ranks[e] for e in others)
        rank = max(ranks, default=0)
        return FactorStack(self.a[others, :rank], self.b[others, :, :rank], ranks)


def add_grouped_lora(output: Tensor, x: Tensor, factors: FactorStack, rows: Tensor) -> Tensor:
    """``output + B_e A_e x`` for every row with its own expert; `output` itself where no expert touches it.

    `x` (k·B, ..., n) with the k entries of a sample side by side, `output` (k·B, ..., m), `rows` (B,) int64
    on the CPU or where `x` is. The last product adds as it goes: a sum of its own can take longer than it.
    """
    present = set(rows.tolist())
    if not any(factors.ranks[expert] for expert in present):
        return output
    if len(present) == 1:
        expert = present.pop()
        rank = factors.ranks[expert]
        hidden = F.linear(x, factors.a[expert, :rank]).flatten(0, -2)
        return torch.addmm(output.flatten(0, -2), hidden, factors.b[expert, :, :rank].mT).view_as(output)
    samples, base = (each.reshape(len(rows), -1, each.shape[-1]) for each in (x, output))
    hidden = torch.bmm(samples, factors.a[rows].mT)
    return torch.baddbmm(base, hidden, factors.b[rows].mT).view_as(output)


def stack_updates(updates: Sequence[LowRank], like: Tensor) -> FactorStack:
    """Stack the updates of several experts on the layer whose weights are `like`."""
    stack = FactorStack.empty(0, like)
    for update in updates:
        stack = stack.with_update(update)
    return stack


def _pad(factors: Tensor, axis: int, size: int) -> Tensor:
    missing = size - factors.shape[axis]
    if not missing:
        return factors
    shape = list(factors.shape)
    shape[axis] = missing
    return torch.cat([factors, factors.new_zeros(shape)], dim=axis)

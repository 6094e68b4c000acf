"""What all pruners share: the budget, and one layer's question "which tokens?"."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla.policy.masks import CoupledMask, Layout

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Budget:
    """Vision tokens per decoder layer to stay within, laid out as `grid` = (cameras, rows, columns).

    `counts` is LFP's schedule (`vla.policy.routing.keep_counts`). Others spread the same mean differently,
    so that every pruner is compared at equal compute.
    """

    counts: tuple[int, ...]
    grid: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """All vision tokens."""
        cameras, rows, columns = self.grid
        return cameras * rows * columns


@dataclass(frozen=True)
class LayerInput:
    """What a decoder layer is about to see: `x` (B, S, d) laid out as `layout`."""

    x: Tensor
    layout: Layout
    mask: CoupledMask
    rotary: Rotary


@dataclass(frozen=True)
class Selection:
    """What a routed layer computes on: the tokens `rows` (B, N) of its sequence, int64, ascending.

    `gate` (B, N) is the router's, 1 for tokens that it does not rank, or None where nothing is gated. `rstd`
    (B, S) are the reciprocal root mean squares of all tokens, where a kernel computed them on the way.
    """

    rows: Tensor
    gate: Tensor | None = None
    rstd: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, span: tuple[int, int], kept: Tensor, gates: Tensor | None = None) -> Selection:
        """All of `x` (B, S, d) but the vision tokens that are not `kept` (B, k); vision stands at `span`.

        `gates` are those of the kept tokens, (B, k), or of all rows, (B, S - V + k).
        """
        first, end = span
        position = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        rows = torch.cat([position[:, :first], kept + first, position[:, end:]], dim=1)
        if gates is not None and gates.shape != rows.shape:
            ones = torch.ones(rows.shape, dtype=x.dtype, device=x.device)
            gates = ones.slice_scatter(gates.to(x.dtype), 1, first, first + kept.shape[1])
        return cls(rows, gates)

    def vision(self, layout: Layout) -> Tensor:
        """The kept vision tokens (B, k) of the sequence laid out as `layout`, counted from the first."""
        first, end = layout.span
        return self.rows[:, first : end - (layout.length - self.rows.shape[1])] - first


class Pruner(nn.Module):
    """Chooses the vision tokens of each layer; `counts` says how many, statically.

    Subclasses set `counts` and define `select`.
    """

    counts: tuple[int, ...]

    def select(
        self, index: int, layer: nn.Module, given: LayerInput, previous: Selection | None
    ) -> Selection:
        """Return what layer `index` computes on: ``counts[index]`` vision tokens and everything else.

        `previous` is what the last pruned layer computed on, None before the first. Text, state and action
        tokens are no candidates.
        """
        raise NotImplementedError


def staged_counts(budget: Budget, starts: tuple[int, ...]) -> tuple[int, ...]:
    """Return counts that shrink by one ratio at every layer of `starts`, with at most the budget's mean.

    A layer of stage ``s`` (0 before ``starts[0]``) keeps ``floor(V r^s)``, at least 1; `r` is the largest
    ratio that stays within the budget.
    """
    layers, allowed = len(budget.counts), sum(budget.counts)
    stages = [sum(layer >= start for start in starts) for layer in range(layers)]

    def counts(ratio: float) -> tuple[int, ...]:
        return tuple(max(1, int(budget.tokens * ratio**stage + 1e-9)) for stage in stages)

    low, high = 0.0, 1.0
    if sum(counts(high)) <= allowed:
        return counts(high)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(counts(middle)) <= allowed else (low, middle)
    return counts(low)


@torch.no_grad()
def attention_scores(layer: nn.Module, given: LayerInput, rotate: bool) -> Tensor:
    """Return the action slots' attention to each vision token in `layer`, mean over slots and heads, (B, V).

    PyramidDrop asks with the last instruction token. Here the instruction stands before the images and the
    action slots are what reads them, so the slots ask. `rotate` applies RoPE. Only the slots' rows of the
    attention matrix are computed.
    """
    attention, layout = layer.self_attn, given.layout
    h = layer.input_layernorm(given.x)
    q = _heads(attention.q_proj(h), attention, "q_norm")
    k = _heads(attention.k_proj(h), attention, "k_norm")
    if rotate:
        cos, sin = (table[:, None] for table in given.rotary)
        q, k = q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin
    q = q[:, :, layout.prefix :]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = (q @ k.transpose(-1, -2)).float() * attention.scaling
    logits = logits.masked_fill(~given.mask.dense[:, :, layout.prefix :].to(q.device), -torch.inf)
    weights = logits.softmax(-1).mean((1, 2))
    return weights[:, layout.text : layout.text + layout.vision]


def _heads(projected: Tensor, attention: nn.Module, norm: str) -> Tensor:
    """(B, S, H * d) to (B, H, S, d), through the head norm that some families (Qwen3) have."""
    heads = projected.unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, norm):
        heads = getattr(attention, norm)(heads)
    return heads.transpose(1, 2)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def among(previous: Tensor | None, scores: Tensor) -> Tensor:
    """Return `scores` (B, V) with -inf for the tokens that are not in `previous` (B, k): dropped for good."""
    if previous is None:
        return scores
    return torch.full_like(scores, -torch.inf).scatter(1, previous, scores.gather(1, previous))

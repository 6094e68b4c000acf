"""Instruction-driven routing: how many tokens a layer keeps, and which (LFP-Routing, FiLM)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def keep_counts(layers: int, tokens: int, floor: float = 0.15, dense_above: float = 0.85) -> tuple[int, ...]:
    """Return how many vision tokens each decoder layer computes on.

    ``r_l = max(cos(pi l / (layers - 1)) / 2 + 1/2, floor)``; a layer with ``r_l > dense_above`` is dense
    (keeps all), any other keeps ``floor(tokens * r_l)`` (released CogVLA code; the paper's text counts from
    1 and clamps at 0.05). The schedule is static, hence so are all shapes.
    """
    ratios = [
        max(0.5 * math.cos(math.pi * layer / max(layers - 1, 1)) + 0.5, floor) for layer in range(layers)
    ]
    return tuple(tokens if ratio > dense_above else max(1, math.floor(tokens * ratio)) for ratio in ratios)


def masked_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean of `x` (B, N, d) over its real tokens, `valid` (B, N); returns (B, d).

    Pads are left out (the published code averages them in, which makes a sample depend on its batch).
    """
    weight = valid.to(x.dtype)[..., None]
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


def select_top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the `k` highest of `scores` (B, N), ascending, (B, k).

    Deterministic on every device: equal scores go to the lower index. A NaN ranks highest, so that it
    shows in the output instead of vanishing with a dropped token.
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=-1).values


def modulate(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """``(1 + gamma) * x + beta`` of `x` (B, N, d) with one gamma and beta (B, d) per sample."""
    return x + gamma[:, None] * x + beta[:, None]


class Film(nn.Module):
    """Scale and shift from a condition: ``(1 + gamma) * x + beta`` with gamma, beta linear in the condition.

    Zero-initialised, so that a fresh FiLM is the identity.
    """

    def __init__(self, condition_dim: int, dim: int, hidden: int | None = None):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(condition_dim, hidden), nn.GELU()) if hidden else nn.Identity()
        self.out = nn.Linear(hidden or condition_dim, 2 * dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Modulate `x` (B, N, dim) by `condition` (B, condition_dim)."""
        return modulate(x, *self.scale_and_shift(condition))

    def scale_and_shift(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """gamma and beta for `condition` (B, condition_dim), each (B, dim)."""
        return self.out(self.hidden(condition)).chunk(2, dim=-1)


class LfpRouter(nn.Module):
    """Score vision tokens by the instruction (LLM-FiLM pruning).

    ``p = softmax(W FiLM(h; u))_1 = sigmoid(w . FiLM(h; u) + b)``, with `u` the mean of the instruction's
    normalised states. FiLM changes scores only; the layer computes on the unmodulated tokens. The weight
    vector starts near zero: every token starts with p = 1/2, so that the gate ``2 p`` starts at 1 and the
    layer unhalved.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.film = Film(dim, dim, hidden=dim // 2)
        self.score = nn.Linear(dim, 1)
        # Not zero: a zero weight would also stop the gradient into FiLM and make the first ranking
        # "lowest index first", that is, blind to the second camera. Smaller at larger widths, so that logits
        # are not: at width 4096 gates would otherwise start anywhere between 0.1 and 1.9.
        nn.init.normal_(self.score.weight, std=0.02 * min(1.0, math.sqrt(128 / dim)))
        nn.init.zeros_(self.score.bias)

    def forward(self, h: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and gates ``2 p``, each (B, V) in fp32, of normalised tokens `h` (B, V, d).

        The ranking uses the logits: sigmoid saturates and would turn distinct scores into ties.
        """
        logits = self.score(self.film(h, u)).squeeze(-1).float()
        return logits, 2 * torch.sigmoid(logits)


class EncoderGate(nn.Module):
    """Mix several vision encoders by the instruction: ``alpha = softmax(W2 GELU(W1 t))`` (EFA-Routing)."""

    def __init__(self, condition_dim: int, encoders: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(condition_dim, condition_dim), nn.GELU(), nn.Linear(condition_dim, encoders)
        )

    def forward(self, streams: list[Tensor], condition: Tensor) -> Tensor:
        """Return ``sum_e alpha_e streams_e``; each stream (B, N, d), `condition` (B, condition_dim)."""
        alpha = F.softmax(self.net(condition).float(), dim=-1)
        stacked = torch.stack(streams, dim=1)
        return (alpha[:, :, None, None].to(stacked.dtype) * stacked).sum(1)

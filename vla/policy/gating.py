"""A decoder layer on some tokens of the sequence, and what a router's weight scales in it.

With ``A`` the layer's attention, ``M`` its MLP, ``LN`` its norms and ``g`` the gates of the tokens chosen, a
routed layer is one of three readings of the same equation::

    vision    y = x + A(g * LN x),   x <- y + g * M(LN y)
    mlp       y = x + A(LN x),       x <- y + g * M(LN y)               CogVLA's released code
    block     y = x + A(LN x),       x <- x + g * (y + M(LN y) - x)     CogVLA's Eq. 15

Gating what a token brings into attention as well ("vision") is what carries a gradient to the last layer's
router: nobody reads a vision token's MLP output there.

The layers are transformers' own modules, called part by part (`vla.policy.layer_parts`) so that kernels may
stand between the parts.
"""

from __future__ import annotations

from torch import Tensor, nn

from vla.kernels.scatter_residual import scatter_residual
from vla.kernels.select_gather_norm import select_gather_norm
from vla.policy.layer_parts import attend, feed, feed_onto
from vla.policy.masks import CoupledMask
from vla.policy.plain import is_plain
from vla.policy.pruners.pruner import Rotary, Selection
from vla.policy.residual_norm import RMS_NORMS, residual_norm

GATES = ("vision", "mlp", "block")
"""Readings by the name that a configuration uses."""


def dense_layer(layer: nn.Module, x: Tensor, mask: CoupledMask, rotary: Rotary) -> Tensor:
    """``y = x + A(LN x);  y + M(LN y)`` on all of `x` (B, S, d)."""
    attended = attend(layer.self_attn, layer.input_layernorm(x), mask, rotary)
    y, h = residual_norm(x, attended, layer.post_attention_layernorm)
    return feed_onto(y, layer.mlp, h)


def routed_layer(
    layer: nn.Module, x: Tensor, chosen: Selection, mask: CoupledMask, rotary: Rotary, reading: str
) -> Tensor:
    """Update the rows ``chosen.rows`` of `x` (B, S, d) by `layer`; the others skip it unchanged: (B, S, d).

    `mask` and `rotary` are those of the rows; `reading` is a name of `GATES`.
    """
    gate = chosen.gate
    residual, h = _gather_norm(layer.input_layernorm, x, chosen, gate if reading == "vision" else None)
    attended = attend(layer.self_attn, h, mask, rotary)
    y, h = residual_norm(residual, attended, layer.post_attention_layernorm)
    update = feed(layer.mlp, h)
    if reading == "block":
        y, update = residual, y + update - residual
    return scatter_residual(x, chosen.rows, y, update, gate)


def _gather_norm(norm: nn.Module, x: Tensor, chosen: Selection, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """The chosen rows of `x` and their ``g * LN``, each (B, N, d)."""
    if chosen.rstd is not None and is_plain(norm, *RMS_NORMS):
        return select_gather_norm(x, chosen.rows, chosen.rstd, norm.weight, gate)
    rows = x.gather(1, chosen.rows[..., None].expand(-1, -1, x.shape[-1]))
    h = norm(rows)
    return rows, h if gate is None else h * gate.to(h.dtype)[..., None]

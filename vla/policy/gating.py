"""What a router's weight scales in a routed layer: three readings of the same equation."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vla.policy.masks import CoupledMask

Rotary = tuple[Tensor, Tensor]
GatedLayer = Callable[[nn.Module, Tensor, Tensor, CoupledMask, Rotary], Tensor]


def gate_vision(layer: nn.Module, x: Tensor, gate: Tensor, mask: CoupledMask, rotary: Rotary) -> Tensor:
    """``x <- x + A(g * LN x);  x <- x + g * M(x)``: tokens enter attention, and leave the MLP, scaled.

    `x` (B, S, d), `gate` (B, S, 1). Gating what a token brings into attention as well is what carries a
    gradient to the last layer's router: nobody reads a vision token's MLP output there.
    """
    x = x + _attend(layer, layer.input_layernorm(x) * gate, mask, rotary)
    return x + gate * _feed(layer, x)


def gate_mlp(layer: nn.Module, x: Tensor, gate: Tensor, mask: CoupledMask, rotary: Rotary) -> Tensor:
    """``x <- x + A(LN x);  x <- x + g * M(x)``: CogVLA's released code."""
    x = x + _attend(layer, layer.input_layernorm(x), mask, rotary)
    return x + gate * _feed(layer, x)


def gate_block(layer: nn.Module, x: Tensor, gate: Tensor, mask: CoupledMask, rotary: Rotary) -> Tensor:
    """``x <- x + g * (layer(x) - x)``: CogVLA's Eq. 15."""
    y = x + _attend(layer, layer.input_layernorm(x), mask, rotary)
    return x + gate * (y + _feed(layer, y) - x)


def _attend(layer: nn.Module, h: Tensor, mask: CoupledMask, rotary: Rotary) -> Tensor:
    return layer.self_attn(hidden_states=h, attention_mask=mask, position_embeddings=rotary)[0]


def _feed(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.mlp(layer.post_attention_layernorm(x))


GATES: dict[str, GatedLayer] = {"vision": gate_vision, "mlp": gate_mlp, "block": gate_block}
"""Placements of a router's gate by the name that a configuration uses."""

"""A decoder layer on some tokens of the sequence, and what a router's weight scales in it.

With ``A`` the layer's attention, ``M`` its MLP, ``LN`` its norms and ``g`` the gates of the tokens chosen, a
routed layer is one of three readings of the same equation::

    vision    y = x + A(g * LN x),   x <- y + g * M(LN y)
    mlp       y = x + A(LN x),       x <- y + g * M(LN y)               CogVLA's released code
    block     y = x + A(LN x),       x <- x + g * (y + M(LN y) - x)     CogVLA's Eq. 15

Gating what a token brings into attention as well ("vision") is what carries a gradient to the last layer's
router: nobody reads a vision token's MLP output there.

The layers are transformers' own modules, called part by part so that kernels may stand between the parts. A
kernel that would replace a module takes its place only where `is_plain` allows.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from vla.kernels import gated_product as swiglu
from vla.kernels.scatter_residual import scatter_residual
from vla.kernels.select_gather_norm import select_gather_norm
from vla.policy.masks import CoupledMask
from vla.policy.plain import is_plain
from vla.policy.pruners.pruner import Rotary, Selection
from vla.policy.residual_norm import RMS_NORMS, residual_norm

GATES = ("vision", "mlp", "block")
"""Readings by the name that a configuration uses."""
MLPS = (LlamaMLP, Qwen2MLP, Qwen3MLP)


def dense_layer(layer: nn.Module, x: Tensor, mask: CoupledMask, rotary: Rotary) -> Tensor:
    """``y = x + A(LN x);  y + M(LN y)`` on all of `x` (B, S, d)."""
    y, h = residual_norm(
        x, _attend(layer, layer.input_layernorm(x), mask, rotary), layer.post_attention_layernorm
    )
    return y + _feed(layer.mlp, h)


def routed_layer(
    layer: nn.Module, x: Tensor, chosen: Selection, mask: CoupledMask, rotary: Rotary, reading: str
) -> Tensor:
    """Update the rows ``chosen.rows`` of `x` (B, S, d) by `layer`; the others skip it unchanged: (B, S, d).

    `mask` and `rotary` are those of the rows; `reading` is a name of `GATES`.
    """
    gate = chosen.gate
    residual, h = _gather_norm(layer.input_layernorm, x, chosen, gate if reading == "vision" else None)
    y, h = residual_norm(residual, _attend(layer, h, mask, rotary), layer.post_attention_layernorm)
    update = _feed(layer.mlp, h)
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


def _attend(layer: nn.Module, h: Tensor, mask: CoupledMask, rotary: Rotary) -> Tensor:
    return layer.self_attn(hidden_states=h, attention_mask=mask, position_embeddings=rotary)[0]


def _feed(mlp: nn.Module, h: Tensor) -> Tensor:
    """``M(h)``; its first half in one launch where that is chosen."""
    if not _is_swiglu(mlp) or swiglu.dispatch(h, mlp.gate_proj.weight).path == "torch":
        return mlp(h)
    return mlp.down_proj(swiglu.gated_product(h, mlp.gate_proj.weight, mlp.up_proj.weight))


def _is_swiglu(mlp: nn.Module) -> bool:
    """Whether `mlp` is ``W_down (silu(W_gate h) * W_up h)`` with two plain matrices inside."""
    if not is_plain(mlp, *MLPS) or mlp.config.hidden_act != "silu":
        return False
    return all(is_plain(w, nn.Linear) and w.bias is None for w in (mlp.gate_proj, mlp.up_proj))

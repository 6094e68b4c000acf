"""The halves of a decoder layer of transformers: its own modules, or fewer launches where chosen (K4).

Where torch is chosen the modules are called, which low-rank factors, expert banks and sharding need; a kernel
reads their parameters instead and takes their place only where `is_plain` allows it.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from vla.kernels import gated_product as swiglu
from vla.kernels import product_residual as down
from vla.kernels import qkv_rope as projections
from vla.kernels.dispatch import Choice
from vla.policy.masks import CoupledMask
from vla.policy.plain import is_plain
from vla.policy.pruners.pruner import Rotary

ATTENTIONS = (LlamaAttention, Qwen2Attention)  # Qwen3 normalises queries and keys before it rotates them
MLPS = (LlamaMLP, Qwen2MLP, Qwen3MLP)


def attend(attention: nn.Module, h: Tensor, mask: CoupledMask, rotary: Rotary) -> Tensor:
    """``A(h)`` for the rows `h` (B, N, d), seen as `mask` says and rotated by `rotary`: (B, N, d)."""
    if not _is_rotary(attention) or _torch(projections.dispatch(h, attention.q_proj.weight, rotary[0])):
        return attention(hidden_states=h, attention_mask=mask, position_embeddings=rotary)[0]
    parts = attention.q_proj, attention.k_proj, attention.v_proj
    biases = None if parts[0].bias is None else tuple(part.bias for part in parts)
    q, k, v = projections.qkv_rope(h, *(part.weight for part in parts), *rotary, biases)
    run = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    attended, _ = run(attention, q, k, v, mask, scaling=attention.scaling)
    return attention.o_proj(attended.flatten(2))


def feed(mlp: nn.Module, h: Tensor) -> Tensor:
    """``M(h)``, the MLP on rows (B, N, d)."""
    if not _is_swiglu(mlp) or _torch(swiglu.dispatch(h, mlp.gate_proj.weight)):
        return mlp(h)
    return mlp.down_proj(swiglu.gated_product(h, mlp.gate_proj.weight, mlp.up_proj.weight))


def feed_onto(residual: Tensor, mlp: nn.Module, h: Tensor) -> Tensor:
    """``residual + M(h)``, each (B, N, d)."""
    if not _is_swiglu(mlp) or _torch(down.dispatch(h, mlp.down_proj.weight)):
        return residual + feed(mlp, h)
    gated = swiglu.gated_product(h, mlp.gate_proj.weight, mlp.up_proj.weight)
    return down.product_residual(residual, gated, mlp.down_proj.weight)


def _torch(choice: Choice) -> bool:
    return choice.path == "torch"


def _is_rotary(attention: nn.Module) -> bool:
    """Whether the three projections are plain matrices, all or none with a bias, and RoPE all between."""
    if not is_plain(attention, *ATTENTIONS):
        return False
    parts = attention.q_proj, attention.k_proj, attention.v_proj
    return all(is_plain(w, nn.Linear) for w in parts) and len({w.bias is None for w in parts}) == 1


def _is_swiglu(mlp: nn.Module) -> bool:
    """Whether `mlp` is ``W_down (silu(W_gate h) * W_up h)`` with three plain matrices inside."""
    if not is_plain(mlp, *MLPS) or mlp.config.hidden_act != "silu":
        return False
    parts = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    return all(is_plain(w, nn.Linear) and w.bias is None for w in parts)

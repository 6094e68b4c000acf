"""Coupled attention (CAtten, arXiv 2508.21046, section 3.3): one mask specification, two exact executions.

What may be seen is said in `vla.policy.masks`; here it is executed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vla.policy.masks import CoupledMask


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention: `q` (B, H, S, d), `k` and `v` (B, G, T, d) with G dividing H, to (B, H, S, d).

    `visible` is a boolean mask that broadcasts to (B, H, S, T), or None. SDPA, except where its backward is
    the bottleneck: in reduced precision on a CPU it costs five times as much as two plain matrix products
    (measured with torch 2.11 at S = T = 80, d = 32: 93 ms against 18 ms), half of a whole training step.
    """
    grouped = k.shape[1] != q.shape[1]
    reduced = q.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    if q.device.type != "cpu" or not reduced or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=grouped)
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    return logits.softmax(-1).to(v.dtype) @ v


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: CoupledMask, scale: float | None = None
) -> Tensor:
    """Run attention as one call with the dense mask, whichever it is.

    `q` (B, H, S, d); `k`, `v` (B, G, S, d) with G dividing H. Returns (B, H, S, d).
    """
    return attend(q, k, v, mask.dense.to(q.device), scale)


def two_call_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: CoupledMask, scale: float | None = None
) -> Tensor:
    """Run coupled attention as one causal call over the prefix and one over all keys for the action rows.

    Exact, for `CoupledMask` itself and no other mask. Without padding neither call needs a mask tensor,
    which is what flash kernels want. Shapes as in `masked_attention`.
    """
    n = mask.prefix
    observed = q[:, :, :n], k[:, :, :n], v[:, :, :n]
    if mask.valid is None:
        grouped = k.shape[1] != q.shape[1]
        prefix = F.scaled_dot_product_attention(*observed, is_causal=True, scale=scale, enable_gqa=grouped)
        action = attend(q[:, :, n:], k, v, None, scale)
    else:
        prefix = attend(*observed, mask.dense[..., :n, :n], scale)
        action = attend(q[:, :, n:], k, v, mask.valid[:, None, None, :], scale)
    return torch.cat([prefix, action], dim=2)


EXECUTIONS = {"coupled_mask": masked_attention, "coupled_two_call": two_call_attention}


def _as_transformers_interface(run):
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: CoupledMask, **kwargs
    ) -> tuple[Tensor, None]:
        out = run(query, key, value, attention_mask, kwargs.get("scaling"))
        return out.transpose(1, 2).contiguous(), None

    return attend


# transformers passes `attention_mask` through untouched, so its own attention classes (and with them
# PEFT's module names) serve us with the specification in place of a tensor.
for _name, _run in EXECUTIONS.items():
    ALL_ATTENTION_FUNCTIONS.register(_name, _as_transformers_interface(_run))

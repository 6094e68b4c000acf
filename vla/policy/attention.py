"""Coupled attention (CAtten, arXiv 2508.21046, section 3.3): one mask specification, two exact executions.

What may be seen is said in `vla.policy.masks`; here it is executed.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vla.kernels.attend import attend
from vla.kernels.coupled_attention import coupled_attention, dispatch
from vla.policy.masks import CoupledMask


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: CoupledMask, scale: float | None = None
) -> Tensor:
    """Run attention as one call with the dense mask, whichever it is.

    `q` (B, H, Q, d) are the queries of the last Q of S tokens; `k`, `v` (B, G, S, d) with G dividing H.
    Returns (B, H, Q, d). The coupled mask itself goes to its Triton kernel where that is chosen.
    """
    if type(mask) is CoupledMask and dispatch(q).path == "triton":
        return coupled_attention(q, k, v, mask.prefix, mask.valid, scale)
    visible = mask.dense[:, :, k.shape[2] - q.shape[2] :]
    return attend(q, k, v, visible.to(q.device), scale)


def two_call_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: CoupledMask, scale: float | None = None
) -> Tensor:
    """Run coupled attention as one causal call over the prefix and one over all keys for the action rows.

    Exact, for `CoupledMask` itself and no other mask. Without padding neither call needs a mask tensor,
    which is what flash kernels want. Shapes as in `masked_attention`.
    """
    return coupled_attention(q, k, v, mask.prefix, mask.valid, scale)


EXECUTIONS = {"coupled_mask": masked_attention, "coupled_two_call": two_call_attention}


def _as_transformers_interface(run):
    def interface(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: CoupledMask, **kwargs
    ) -> tuple[Tensor, None]:
        out = run(query, key, value, attention_mask, kwargs.get("scaling"))
        return out.transpose(1, 2).contiguous(), None

    return interface


# transformers passes `attention_mask` through untouched, so its own attention classes (and with them
# PEFT's module names) serve us with the specification in place of a tensor.
for _name, _run in EXECUTIONS.items():
    ALL_ATTENTION_FUNCTIONS.register(_name, _as_transformers_interface(_run))

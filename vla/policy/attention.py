"""Coupled attention (CAtten): one specification, two exact executions.

The sequence is ``[text | vision | state | action]``. Everything before the action block is the *prefix*
and is causal; the action block sees the whole prefix and, in both directions, itself
(arXiv 2508.21046, section 3.3). Padded text positions are nobody's key.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class CoupledMask:
    """Which query may look at which key.

    `length` tokens, of which the first `prefix` are causal and the rest are the action block; `valid`
    (B, length) marks real tokens, or is None when nothing is padded. Query ``i`` may see key ``j`` iff
    ``valid[j]`` and (``j <= i`` or ``i >= prefix``).

    Examples with rows = queries, columns = keys, ``1`` = visible::

        length 5, prefix 3            length 3, prefix 3          length 3, prefix 0
        (3 observed, 2 action slots)  (plain causal decoder)      (plain bidirectional encoder)
        1 0 0 | 0 0                   1 0 0                       1 1 1
        1 1 0 | 0 0                   1 1 0                       1 1 1
        1 1 1 | 0 0                   1 1 1                       1 1 1
        ------+----
        1 1 1 | 1 1
        1 1 1 | 1 1

        length 5, prefix 3, valid = 1 0 1 1 1 (the second text token is padding)
        1 0 0 | 0 0
        1 0 0 | 0 0      a padded query still sees real keys, so that its (unread) softmax is finite
        1 0 1 | 0 0
        ------+----
        1 0 1 | 1 1
        1 0 1 | 1 1

    The first token must be real: a padded query needs at least one key.
    """

    length: int
    prefix: int
    valid: Tensor | None = None

    @cached_property
    def dense(self) -> Tensor:
        """The mask as booleans, (B or 1, 1, length, length); True = visible."""
        device = None if self.valid is None else self.valid.device
        position = torch.arange(self.length, device=device)
        query, key = position[:, None], position[None, :]
        visible = ((key <= query) | (query >= self.prefix))[None, None]
        return visible if self.valid is None else visible & self.valid[:, None, None, :]

    def without(self, dropped: int, valid: Tensor | None) -> CoupledMask:
        """The mask of a subsequence that lost `dropped` prefix tokens and kept the order of the rest."""
        return CoupledMask(self.length - dropped, self.prefix - dropped, valid)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: CoupledMask, scale: float | None = None
) -> Tensor:
    """Run coupled attention as one SDPA call with the dense mask.

    `q` (B, H, S, d); `k`, `v` (B, G, S, d) with G dividing H. Returns (B, H, S, d).
    """
    dense = mask.dense.to(q.device)
    return F.scaled_dot_product_attention(q, k, v, dense, scale=scale, enable_gqa=k.shape[1] != q.shape[1])


def two_call_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: CoupledMask, scale: float | None = None
) -> Tensor:
    """Run coupled attention as causal SDPA over the prefix plus unmasked SDPA for the action rows.

    Exact, not an approximation. Without padding neither call needs a mask tensor, which is what flash
    kernels want. Shapes as in `masked_attention`.
    """
    grouped = {"scale": scale, "enable_gqa": k.shape[1] != q.shape[1]}
    n = mask.prefix
    if mask.valid is None:
        prefix_mask, keys_mask = None, None
    else:
        prefix_mask, keys_mask = mask.dense[..., :n, :n], mask.valid[:, None, None, :]
    parts = []
    if n:
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, :n], k[:, :, :n], v[:, :, :n], prefix_mask, is_causal=prefix_mask is None, **grouped
            )
        )
    if n < mask.length:
        parts.append(F.scaled_dot_product_attention(q[:, :, n:], k, v, keys_mask, **grouped))
    return torch.cat(parts, dim=2)


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

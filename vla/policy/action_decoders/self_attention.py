"""The ablation of `cross_attention`: the same expert whose rows also attend to each other.

VLA-Adapter's expert (arXiv 2509.09372) has this third stream, MergeVLA's (arXiv 2511.18810) is what is left
without it. Nothing else differs here, so that a comparison shows what the stream does: keys and values of a
block then come from the rows themselves, that is, from all blocks before it and no longer from the language
model alone. Averaged with another task's expert, each block reads rows that neither expert was trained on,
and the difference grows from block to block. MergeVLA's paper reports 0 % for merged VLA-Adapters.

On nano that has not been seen: merging two skills (base 800 steps, experts 300, seed 0) by task arithmetic
raised the action error on demonstrations from 0.067 to 0.098 with cross-attention, from 0.069 to 0.088 here.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from vla.policy.action_decoders.cross_attention import CrossAttention, CrossAttentionBlock, initialise


class SelfAttentionBlock(CrossAttentionBlock):
    """A block with ``s = [q_A k_self', q_A k_A', sigma(g) q_T k_T'] / sqrt(d_head)`` and values to match.

    VLA-Adapter has one query for all streams, and a gate ``tanh(g)`` that starts at 0.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads)
        self.k_self, self.v_self = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for linear in (self.k_self, self.v_self):
            initialise(linear)

    def action_stream(self, x: Tensor, h_action: Tensor) -> tuple[Tensor, Tensor]:
        """``[k_self, k_A]`` and ``[v_self, v_A]``, each (B, R + A, d)."""
        keys, values = super().action_stream(x, h_action)
        return torch.cat([self.k_self(x), keys], dim=1), torch.cat([self.v_self(x), values], dim=1)


class SelfAttention(CrossAttention):
    """`CrossAttention` with blocks that attend to themselves too; for measuring, not for merging."""

    block: ClassVar[type[CrossAttentionBlock]] = SelfAttentionBlock

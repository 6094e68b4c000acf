"""LFP-Routing: each layer ranks all vision tokens by the instruction; what it skips competes again."""

from __future__ import annotations

from torch import Tensor, nn

from vla.policy.pruners.pruner import Budget, LayerInput, Pruner
from vla.policy.routing import LfpRouter, masked_mean, select_top_k


class LfpRouting(nn.ModuleDict, Pruner):
    """One `LfpRouter` per pruned layer, by layer index (arXiv 2508.21046, section 3.2)."""

    def __init__(self, hidden_size: int, budget: Budget):
        pruned = (layer for layer, count in enumerate(budget.counts) if count < budget.tokens)
        super().__init__({str(layer): LfpRouter(hidden_size) for layer in pruned})
        self.counts = budget.counts

    def select(
        self, index: int, layer: nn.Module, given: LayerInput, previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Rank by the FiLM-ed router; the gate is what its gradient flows through."""
        text, vision = given.layout.text, given.layout.vision
        normed = layer.input_layernorm(given.x[:, : text + vision])
        instruction, valid = normed[:, :text], given.mask.valid
        u = instruction.mean(1) if valid is None else masked_mean(instruction, valid[:, :text])
        logits, gates = self[str(index)](normed[:, text:], u)
        kept = select_top_k(logits, self.counts[index])
        return kept, gates.gather(1, kept)

"""LFP-Routing as CogVLA's released code has it; what differs from `vla.policy.pruners.lfp` is in `select`."""

from __future__ import annotations

from torch import Tensor, nn

from vla.policy.pruners.pruner import Budget, LayerInput, Pruner, Selection
from vla.policy.routing import masked_mean, select_top_k


class ReleasedRouter(nn.Module):
    """``p = softmax(W h')_1`` with ``h' = (1 + gamma(u)) * h + beta(u)``, gamma and beta an MLP each.

    Default initialisation, as released: p starts near 1/2 and halves what it gates.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.scale, self.shift = (
            nn.Sequential(nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim)) for _ in range(2)
        )
        self.router = nn.Linear(dim, 2)

    def modulate(self, h: Tensor, u: Tensor) -> Tensor:
        """Vision tokens `h` (B, V, d) by the mean `u` (B, d)."""
        return (1 + self.scale(u)[:, None]) * h + self.shift(u)[:, None]

    def logits(self, h: Tensor) -> Tensor:
        """``w_1 h - w_0 h`` in fp32, (B, N): p is its sigmoid."""
        both = self.router(h).float()
        return both[..., 1] - both[..., 0]


class ReleasedLfpRouting(nn.ModuleDict, Pruner):
    """One `ReleasedRouter` per pruned layer, by layer index."""

    def __init__(self, hidden_size: int, budget: Budget):
        pruned = (layer for layer, count in enumerate(budget.counts) if count < budget.tokens)
        super().__init__({str(layer): ReleasedRouter(hidden_size) for layer in pruned})
        self.counts = budget.counts

    def select(
        self, index: int, layer: nn.Module, given: LayerInput, previous: Selection | None
    ) -> Selection:
        """Rank vision by the FiLM-ed router; gate every token, text, state and action by the plain one.

        The condition is the mean over what stands between vision and the action block: state and prompt.
        Pads stay out of it (the released code leaves them in when training in batches).
        """
        layout, router = given.layout, self[str(index)]
        first, end = layout.text, layout.text + layout.vision
        h = layer.input_layernorm(given.x)
        between, valid = h[:, end : layout.prefix], given.mask.valid
        u = between.mean(1) if valid is None else masked_mean(between, valid[:, end : layout.prefix])
        vision = router.logits(router.modulate(h[:, first:end], u))
        kept = select_top_k(vision, self.counts[index])
        gates = router.logits(h).sigmoid()
        vision = vision.sigmoid().gather(1, kept)
        return Selection.of(given.x, layout.span, kept, layout.with_vision(gates, vision))

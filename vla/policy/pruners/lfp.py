"""LFP-Routing: each layer ranks all vision tokens by the instruction; what it skips competes again."""

from __future__ import annotations

from torch import Tensor, nn

from vla.kernels.film_route_select import dispatch, film_route_select, fold_router
from vla.policy.plain import is_plain
from vla.policy.pruners.pruner import Budget, LayerInput, Pruner, Selection
from vla.policy.residual_norm import RMS_NORMS
from vla.policy.routing import LfpRouter, masked_mean, select_top_k


class LfpRouting(nn.ModuleDict, Pruner):
    """One `LfpRouter` per pruned layer, by layer index (arXiv 2508.21046, section 3.2)."""

    def __init__(self, hidden_size: int, budget: Budget):
        pruned = (layer for layer, count in enumerate(budget.counts) if count < budget.tokens)
        super().__init__({str(layer): LfpRouter(hidden_size) for layer in pruned})
        self.counts = budget.counts

    def select(
        self, index: int, layer: nn.Module, given: LayerInput, previous: Selection | None
    ) -> Selection:
        """Rank by the FiLM-ed router; the gate is what its gradient flows through."""
        text, valid, norm = given.layout.text, given.mask.valid, layer.input_layernorm
        normed = norm(given.x[:, : given.layout.span[1]])
        instruction = normed[:, :text]
        u = instruction.mean(1) if valid is None else masked_mean(instruction, valid[:, :text])
        return self.route(index, norm, given.x, u, given.layout.span, normed[:, text:])

    def route(
        self,
        index: int,
        norm: nn.Module,
        x: Tensor,
        u: Tensor,
        span: tuple[int, int],
        normed: Tensor | None = None,
    ) -> Selection:
        """Rank the vision tokens `span` of `x` (B, S, d) for layer `index` under the instruction `u` (B, d).

        `norm` is the layer's first, whose weight and epsilon the folded kernel takes in; `normed` (B, V, d)
        is what it makes of the vision tokens, where that is known.
        """
        router, k = self[str(index)], self.counts[index]
        foldable = is_plain(router, LfpRouter) and is_plain(router.score, nn.Linear)
        if foldable and is_plain(norm, *RMS_NORMS) and dispatch(x).path == "triton":
            score = router.score
            folded = fold_router(score.weight[0], score.bias, norm.weight, *router.film.scale_and_shift(u))
            return Selection(*film_route_select(x, *folded, k, 2.0, norm.variance_epsilon, span))
        logits, gates = router(norm(x[:, span[0] : span[1]]) if normed is None else normed, u)
        kept = select_top_k(logits, k)
        return Selection.of(x, span, kept, gates.gather(1, kept))

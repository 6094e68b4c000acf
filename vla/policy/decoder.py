"""LFP-Routing: a Hugging Face decoder that computes each layer only on the vision tokens worth it.

A routed layer gathers the `k_l` highest-ranked vision tokens, runs on them and on all text, state and
action tokens, and scatters the result back. Unselected tokens skip the layer unchanged and compete again
in the next (bypass, not deletion); in that layer they are nobody's key (arXiv 2508.21046, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vla.policy.gating import dense_layer, routed_layer
from vla.policy.masks import Layout
from vla.policy.pruners import PARITY_PRUNERS, PRUNERS
from vla.policy.pruners.pruner import Budget, LayerInput, Rotary, Selection


class RoutedDecoder(nn.Module):
    """The decoder stack with its routers; `counts` holds the kept vision tokens per layer.

    `pruner` names what ranks the tokens (`PRUNERS`), `mask` what attends to what (`MASKS`), `gate` what a
    router's weight scales (`GATES`). `parity` takes the released code's router and renumbers positions from
    0 in every routed layer, as it does: a token's distance to the slots then changes with what else was kept.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        budget: Budget,
        pruner: str = "lfp",
        mask: str = "coupled",
        gate: str = "vision",
        parity: bool = False,
    ):
        super().__init__()
        self.backbone = backbone
        self.mask, self.gate, self.parity = mask, gate, parity
        self.routers = (PARITY_PRUNERS if parity else PRUNERS)[pruner](backbone.config.hidden_size, budget)
        self.counts, self.grid, self.vision_tokens = self.routers.counts, budget.grid, budget.tokens

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed token ids (B, T) to (B, T, d)."""
        return self.backbone.embed_tokens(tokens)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        text_valid: Tensor | None = None,
        trace: dict | None = None,
        layers: list[Tensor] | None = None,
    ) -> Tensor:
        """Run all layers and the final norm on `x` (B, S, d) laid out as `layout`.

        `text_valid` (B, layout.text, or more of the sequence) is False on padding, which is excluded from
        attention, from the instruction mean and from RoPE positions: a sample's result does not depend on its
        batch. When
        `trace` is a dict, ``trace["kept"]`` maps each routed layer to its kept indices (B, k_l). When
        `layers` is a list, it receives the states after each layer, the last of them normalised: what
        transformers calls ``hidden_states[1:]``.
        """
        valid = None
        if text_valid is not None:
            tail = text_valid.new_ones(len(x), layout.length - text_valid.shape[1])
            valid = torch.cat([text_valid, tail], dim=1)
        mask = layout.mask(self.mask, valid)
        rotary = self.backbone.rotary_emb(x, self.positions(x, valid))
        chosen = None
        for index, layer in enumerate(self.backbone.layers):
            if self.counts[index] < layout.vision:
                given = LayerInput(x, layout, mask, rotary)
                chosen = self.routers.select(index, layer, given, chosen)
                x = self._routed(layer, given, chosen)
                if trace is not None:
                    trace.setdefault("kept", {})[index] = chosen.vision(layout)
            else:
                x = dense_layer(layer, x, mask, rotary)
            if layers is not None:
                layers.append(x)
        x = self.backbone.norm(x)
        if layers is not None:
            layers[-1] = x
        return x

    @staticmethod
    def positions(x: Tensor, valid: Tensor | None) -> Tensor:
        """Return the RoPE positions of the tokens of `x` (B, S, d), (B or 1, S); padding takes none."""
        if valid is None:
            return torch.arange(x.shape[1], device=x.device)[None]
        return valid.long().cumsum(1) - 1

    def _routed(self, layer: nn.Module, given: LayerInput, chosen: Selection) -> Tensor:
        """Compute `layer` on what was `chosen`: (B, S, d)."""
        mask, rows = given.mask, chosen.rows
        dropped = given.x.shape[1] - rows.shape[1]
        small = mask.without(dropped, None if mask.valid is None else mask.valid.gather(1, rows))
        if self.parity:
            rotary = self.backbone.rotary_emb(given.x, self.positions(rows, small.valid))
        else:
            rotary = gather_rotary(given.rotary, rows)
        return routed_layer(layer, given.x, chosen, small, rotary, self.gate)


def gather_rotary(rotary: Rotary, rows: Tensor) -> Rotary:
    """RoPE tables of the tokens `rows` (B, N), at their original positions: (B, N, d_head)."""
    index = rows[..., None].expand(-1, -1, rotary[0].shape[-1])
    return tuple(table.expand(len(rows), -1, -1).gather(1, index) for table in rotary)

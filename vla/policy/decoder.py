"""LFP-Routing: a Hugging Face decoder that computes each layer only on the vision tokens worth it.

A routed layer gathers the `k_l` highest-ranked vision tokens, runs on them and on all text, state and
action tokens, and scatters the result back. Unselected tokens skip the layer unchanged and compete again
in the next (bypass, not deletion); in that layer they are nobody's key (arXiv 2508.21046, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vla.policy.gating import GATES
from vla.policy.masks import CoupledMask, Layout
from vla.policy.pruners import PARITY_PRUNERS, PRUNERS
from vla.policy.pruners.pruner import Budget, LayerInput, Rotary


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
        kept = None
        for index, layer in enumerate(self.backbone.layers):
            if self.counts[index] < layout.vision:
                given = LayerInput(x, layout, mask, rotary)
                kept, gates = self.routers.select(index, layer, given, kept)
                x = self._routed(layer, given, kept, gates)
                if trace is not None:
                    trace.setdefault("kept", {})[index] = kept
            else:
                x = layer(x, attention_mask=mask, position_embeddings=rotary)
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

    def _routed(self, layer: nn.Module, given: LayerInput, kept: Tensor, gates: Tensor | None) -> Tensor:
        """Gather the `kept` vision tokens (B, k), compute with their `gates`, scatter: (B, S, d)."""
        x, layout, mask = given.x, given.layout, given.mask
        text, vision, rest = x.split([layout.text, layout.vision, layout.state + layout.action], 1)
        columns = _columns(kept, layout)
        chosen = vision.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        gate = torch.ones(columns.shape, dtype=x.dtype, device=x.device)
        if gates is not None and gates.shape == columns.shape:
            gate = gates.to(x.dtype)
        elif gates is not None:
            gate = gate.slice_scatter(gates.to(x.dtype), 1, layout.text, layout.text + kept.shape[1])
        small = mask.without(
            layout.vision - kept.shape[1], None if mask.valid is None else mask.valid.gather(1, columns)
        )
        y = torch.cat([text, chosen, rest], dim=1)
        if self.parity:
            rotary = self.backbone.rotary_emb(y, self.positions(y, small.valid))
        else:
            rotary = _gather_rotary(given.rotary, columns)
        y = self.gated_layer(layer, y, gate[..., None], small, rotary)
        text, chosen, rest = y.split([layout.text, kept.shape[1], rest.shape[1]], 1)
        vision = vision.scatter(1, kept[..., None].expand_as(chosen), chosen)
        return torch.cat([text, vision, rest], dim=1)

    def gated_layer(
        self, layer: nn.Module, x: Tensor, gate: Tensor, mask: CoupledMask, rotary: Rotary
    ) -> Tensor:
        """Run `layer` on `x` (B, S, d), scaled by `gate` (B, S, 1) where `vla.policy.gating` says."""
        return GATES[self.gate](layer, x, gate, mask, rotary)


def _columns(kept: Tensor, layout: Layout) -> Tensor:
    """Positions in the full sequence of the tokens that a routed layer computes on, (B, S - V + k)."""
    position = torch.arange(layout.length, device=kept.device).expand(len(kept), -1)
    head, tail = position[:, : layout.text], position[:, layout.text + layout.vision :]
    return torch.cat([head, kept + layout.text, tail], dim=1)


def _gather_rotary(rotary: Rotary, columns: Tensor) -> Rotary:
    """RoPE tables of the kept tokens, at their original positions (B, S', d_head)."""
    index = columns[..., None].expand(-1, -1, rotary[0].shape[-1])
    return tuple(table.expand(len(columns), -1, -1).gather(1, index) for table in rotary)

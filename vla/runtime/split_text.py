"""The decoder as two streams: the instruction, which sees nothing else, and what is observed.

Text stands first and every mask of `TEXT_BLIND` is causal over it, so that text states, keys and values do
not depend on camera or state. `RoutedDecoder` computes them again with every observation, in one sequence;
here the text runs by itself and lends its keys and values to the rest. Same weights, same result up to
rounding; what the instruction alone decides can then be computed once (`vla.runtime.specialise`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vla.policy.attention import masked_attention
from vla.policy.decoder import RoutedDecoder, gather_rotary
from vla.policy.gating import dense_layer, routed_layer
from vla.policy.masks import CoupledMask, Layout
from vla.policy.pruners import LfpRouting
from vla.policy.pruners.keep_all import KeepAll
from vla.policy.pruners.pruner import Rotary
from vla.policy.routing import masked_mean

TEXT_BLIND = ("coupled", "causal", "no_vision_to_vision")
"""Masks in which text sees text alone."""
ATTENTION = "split_text"


@dataclass
class Stream:
    """What one attention call of a stream needs: who sees whom, and keys and values from elsewhere.

    `mask` is over all tokens whose keys are seen, of which the stream's own are the last. `before` holds the
    text's keys and values, each (B, G, T, d), for the observed stream; the text stream has none. A call
    leaves its own keys and values in `own`.
    """

    mask: CoupledMask
    before: tuple[Tensor, Tensor] | None = None
    own: tuple[Tensor, Tensor] | None = None


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Stream, **kwargs
) -> tuple[Tensor, None]:
    """transformers' attention interface; `query` and `key` come rotated."""
    stream = attention_mask
    stream.own = key, value
    if stream.before is not None:
        key, value = (torch.cat(pair, dim=2) for pair in zip(stream.before, stream.own, strict=True))
    out = masked_attention(query, key, value, stream.mask, kwargs.get("scaling"))
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)


def can_split(decoder: RoutedDecoder) -> bool:
    """Whether text depends on nothing observed, and the pruner ranks vision without the other tokens."""
    blind = decoder.mask in TEXT_BLIND and not decoder.parity  # parity has vision first
    return blind and isinstance(decoder.routers, LfpRouting | KeepAll)


class SplitTextDecoder(nn.Module):
    """Stands in for the `RoutedDecoder` that it takes over, whose attention it sets to its own.

    `embed` and `forward` are called in turn, as `CogMergeModel.forward` does: the text rows of `x` are what
    `embed` returned last.
    """

    def __init__(self, decoder: RoutedDecoder):
        super().__init__()
        self.decoder = decoder
        decoder.backbone.config._attn_implementation = ATTENTION

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed token ids (B, T) to (B, T, d)."""
        self._text = self.decoder.embed(tokens)
        return self._text

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        text_valid: Tensor,
        trace: None = None,
        layers: list[Tensor] | None = None,
    ) -> Tensor:
        """See `RoutedDecoder.forward`; routers leave no trace here."""
        text, rest = self._text, x[:, layout.text :]
        backbone = self.decoder.backbone
        valid = torch.cat([text_valid, text_valid.new_ones(rest.shape[:2])], dim=1)
        tables = backbone.rotary_emb(text, self.decoder.positions(text, valid))
        text_rotary = tuple(table[:, : layout.text] for table in tables)
        rotary = tuple(table[:, layout.text :] for table in tables)
        causal = CoupledMask(layout.text, layout.text, text_valid)
        mask = layout.mask(self.decoder.mask, valid)
        for index, layer in enumerate(backbone.layers):
            stream = Stream(causal)
            instruction, text = text, dense_layer(layer, text, stream, text_rotary)
            count = self.decoder.counts[index]
            small = mask.without(layout.vision - count, valid[:, : layout.length - layout.vision + count])
            observed = Stream(small, before=stream.own)
            if count < layout.vision:
                u = masked_mean(layer.input_layernorm(instruction), text_valid)
                rest = self._routed(index, rest, layout.vision, u, observed, rotary)
            else:
                rest = dense_layer(layer, rest, observed, rotary)
            if layers is not None:
                layers.append(torch.cat([text, rest], dim=1))
        x = backbone.norm(torch.cat([text, rest], dim=1))
        if layers is not None:
            layers[-1] = x
        return x

    def _routed(
        self, index: int, rest: Tensor, vision: int, u: Tensor, observed: Stream, rotary: Rotary
    ) -> Tensor:
        """Compute layer `index`, of the `vision` first rows those that the text's mean `u` (B, d) chooses."""
        layer = self.decoder.backbone.layers[index]
        chosen = self.decoder.routers.route(index, layer.input_layernorm, rest, u, (0, vision))
        tables = gather_rotary(rotary, chosen.rows)
        return routed_layer(layer, rest, chosen, observed, tables, self.decoder.gate)

"""What stands where in the decoder's input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vla.policy.masks import Layout


@dataclass(frozen=True)
class Sequence:
    """Decoder input `x` (B, S, d), its `layout`, and which of its leading tokens are real, (B, <= S)."""

    x: Tensor
    layout: Layout
    valid: Tensor


def text_first(text: Tensor, valid: Tensor, vision: Tensor, state: list[Tensor], slots: Tensor) -> Sequence:
    """``[text | vision | state | slots]``: see `vla.policy.model.CogMergeModel` for why.

    `text` (B, T, d) with `valid` (B, T), `vision` (B, V, d), `state` one token or none, `slots` (B, A, d).
    """
    layout = Layout(text.shape[1], vision.shape[1], len(state), slots.shape[1])
    return Sequence(_join(text, vision, *state, slots), layout, valid)


def released_order(
    text: Tensor, valid: Tensor, vision: Tensor, state: list[Tensor], slots: Tensor
) -> Sequence:
    """``[BOS | vision | state | prompt | slots]``: the order of OpenVLA-OFT and CogVLA.

    The last slot is the embedded STOP token. In terms of `Layout`, "text" is BOS alone and "state" all that
    stands between vision and the slots. Padding moves from the prompt's end to its beginning, so that the
    prompt ends where the slots begin, in every row; positions count real tokens, so nothing else changes.
    """
    prompt, real = _pads_first(text[:, 1:], valid[:, 1:])
    parts = [text[:, :1], vision, *state, prompt, slots]
    layout = Layout(1, vision.shape[1], len(state) + prompt.shape[1], slots.shape[1])
    before = valid.new_ones(len(valid), 1 + vision.shape[1] + len(state))
    return Sequence(_join(*parts), layout, torch.cat([before, real], dim=1))


def _pads_first(tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    order = valid.long().argsort(dim=1, stable=True)
    return tokens.gather(1, order[..., None].expand_as(tokens)), valid.gather(1, order)


def _join(first: Tensor, *others: Tensor) -> Tensor:
    return torch.cat([first, *(part.to(first.dtype) for part in others)], dim=1)

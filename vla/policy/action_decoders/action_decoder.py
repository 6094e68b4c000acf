"""What every action decoder has: what it reads of the language model, its loss, what it shares in a merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vla.policy.masks import Layout


@dataclass(frozen=True)
class Readout:
    """What the language model hands to an action decoder, laid out as `layout`.

    `final` (B, S, d) are its output states, `state` (B, 1, d) is the projected robot state where the data has
    one. For a decoder that `reads_layers`, `layers` are the states after each layer, (B, S, d), normalised
    after the last.
    """

    layout: Layout
    final: Tensor
    state: Tensor | None = None
    layers: list[Tensor] | None = None

    def slots(self, states: Tensor) -> Tensor:
        """The action slots among `states` (B, S, d)."""
        return states[:, self.layout.prefix :]

    def vision(self, states: Tensor) -> Tensor:
        """The vision tokens among `states` (B, S, d)."""
        return states[:, self.layout.text : self.layout.text + self.layout.vision]


class LearnedTokens(nn.Module):
    """Tokens that are the same for every sample, (count, d).

    A module and not a bare parameter: PEFT keeps by module what was trained in full, and an expert bank puts
    each row's own version into the calls of a module.
    """

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(count, dim) * 0.5)  # as large as `CogMergeModel.slots`

    def forward(self, batch: Tensor) -> Tensor:
        """The tokens once per sample of `batch` (B, ...): (B, count, d)."""
        return self.tokens.expand(len(batch), -1, -1)


class ActionDecoder(nn.Module):
    """Turns what the language model computed into an action chunk.

    Subclasses take the policy's configuration.
    """

    #: Whether it reads the states of every layer. Then the sequence ends with its own `queries` in place of
    #: action slots, and the robot state goes to the decoder and not through the language model.
    reads_layers: ClassVar[bool] = False

    @property
    def slot_count(self) -> int:
        """Learned slots that it wants at the end of the sequence; unused by one that `reads_layers`."""
        raise NotImplementedError

    @property
    def private_parts(self) -> tuple[str, ...]:
        """Globs on parameter names below this module: what a task keeps for itself when experts merge.

        Everything else in it is shared between tasks. By default all of it is private.
        """
        return ("*",)

    def forward(self, read: Readout) -> tuple[Tensor, Tensor]:
        """Normalised actions (B, K, D) in fp32, and a state (B, d) that knows where the hand is going."""
        raise NotImplementedError

    @staticmethod
    def loss(predicted: Tensor, target: Tensor, is_pad: Tensor | None = None) -> Tensor:
        """Mean absolute error per sample, (B,), over the steps that are not padding.

        `predicted`, `target` (B, K, D); `is_pad` (B, K) marks steps after the episode's end. A sample with
        padding only counts 0.
        """
        error = (predicted - target).abs().mean(-1)
        if is_pad is None:
            return error.mean(-1)
        real = (~is_pad).to(error.dtype)
        return (error * real).sum(-1) / real.sum(-1).clamp(min=1)

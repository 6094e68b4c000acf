"""The CogVLA network, assembled: text, vision, state and action slots through one routed decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla.policy.action_decoders import ACTION_DECODERS
from vla.policy.action_decoders.action_decoder import Readout
from vla.policy.backbones import decoder_backbone
from vla.policy.decoder import RoutedDecoder
from vla.policy.head import seeded
from vla.policy.pruners.pruner import Budget
from vla.policy.routing import keep_counts, masked_mean
from vla.policy.sequence import Sequence, released_order, text_first
from vla.policy.vision import VisionTower

#: Normalised states beyond this are clamped: an arm that strays outside the demonstrations should look
#: unusual to the network, not infinite.
STATE_LIMIT = 5.0


@dataclass
class Prediction:
    """`actions` (B, K, D), normalised; `keyframe` (B, F) in the state's units, relative to now, or None."""

    actions: Tensor
    keyframe: Tensor | None


class CogMergeModel(nn.Module):
    """Predict an action chunk from images, state and instruction in one pass.

    The sequence is ``[text | vision | state | action slots]``. Text comes first, unlike in the released
    checkpoints (vision first), for two reasons. Vision tokens then attend to the instruction causally in
    every layer, in place of meeting it through FiLM alone, which matters when nothing is pretrained. And
    no text state depends on what the camera sees, so that text keys, values and every FiLM scale and shift
    are constants of the instruction that a runtime may cache. The state follows vision so that it can
    summarise both for the slots. For an action decoder that reads every layer, the sequence is
    ``[text | vision | action queries]`` and the decoder reads the state beside it.

    In parity mode the sequence is that of the released code, with zeros for slots and the STOP token behind
    them, and STOP counts in the instruction's mean.
    """

    def __init__(self, config, pretrained: bool = False):
        super().__init__()
        self.config = config
        dim = config.hidden_size
        grid = (len(config.camera_keys), *config.vision_grid)
        counts = keep_counts(
            config.decoder_layers, math.prod(grid), config.keep_floor, config.keep_dense_above
        )
        self.vision = VisionTower(config, condition_dim=dim, pretrained=pretrained)
        self.decoder = RoutedDecoder(
            decoder_backbone(config, pretrained),
            Budget(counts, grid),
            pruner=config.token_pruner,
            mask=config.attention_mask,
            gate=config.router_gate,
            parity=config.parity,
        )
        self.build_head()

    def build_head(self) -> None:
        """Build anew what has no pretrained origin, from ``config.head_seed`` (see `vla.policy.head`)."""
        config, dim, seed = self.config, self.config.hidden_size, self.config.head_seed
        with seeded(seed, "state_projector"):
            self.state_projector = (
                nn.Sequential(nn.Linear(config.state_dim, dim), nn.GELU(), nn.Linear(dim, dim))
                if config.state_dim
                else None
            )
        with seeded(seed, "action_decoder"):
            self.action_decoder = ACTION_DECODERS[config.action_decoder](config)
        # As large as a normalised token: RMSNorm would hide a smaller scale from the layers but not from
        # the residual stream.
        learned = not (self.reads_layers or config.parity)
        with seeded(seed, "slots"):
            self.slots = (
                nn.Parameter(torch.randn(self.action_decoder.slot_count, dim) * 0.5) if learned else None
            )
        with seeded(seed, "keyframe_head"):
            self.keyframe_head = nn.Linear(dim, config.keyframe_dim) if config.keyframe else None

    @property
    def reads_layers(self) -> bool:
        """Whether the action decoder reads every layer of the language model (see `ActionDecoder`)."""
        return self.action_decoder.reads_layers

    def forward(
        self,
        images: Tensor,
        state: Tensor | None,
        tokens: Tensor,
        token_valid: Tensor,
        trace: dict | None = None,
    ) -> Prediction:
        """Predict from one observation per sample.

        `images` (B, I, 3, S, S) float in [0, 1]; `state` (B, state_dim), normalised; `tokens` (B, T)
        instruction ids, the first of them always real; `token_valid` (B, T) bool, False on padding.
        `trace`, when a dict, collects router statistics (see `VisionTower` and `RoutedDecoder`).
        """
        text = self.decoder.embed(tokens)
        vision = self.vision(images, self.condition(text, token_valid), trace)
        state = None if self.state_projector is None else self._project_state(state)
        sequence = self._arrange(text, token_valid, vision, state)
        layers: list[Tensor] | None = [] if self.reads_layers else None
        x = self.decoder(sequence.x, sequence.layout, sequence.valid, trace, layers)
        return self._decode(Readout(sequence.layout, x, state, layers))

    def condition(self, text: Tensor, valid: Tensor) -> Tensor:
        """The instruction for vision's FiLM and gate: mean embedding of the real tokens, (B, d)."""
        if self.config.parity:
            text = torch.cat([text, self._stop(text)], dim=1)
            valid = torch.cat([valid, valid[:, :1]], dim=1)
        return masked_mean(text, valid)

    def _arrange(self, text: Tensor, valid: Tensor, vision: Tensor, state: Tensor | None) -> Sequence:
        before = [] if state is None or self.reads_layers else [state]
        if self.config.parity:
            zeros = text.new_zeros(len(text), self.action_decoder.slot_count - 1, text.shape[-1])
            return released_order(text, valid, vision, before, torch.cat([zeros, self._stop(text)], dim=1))
        if self.reads_layers:
            slots = self.action_decoder.queries(text)
        else:
            slots = self.slots.expand(len(text), -1, -1)
        return text_first(text, valid, vision, before, slots)

    def _stop(self, text: Tensor) -> Tensor:
        """The embedded end-of-text token, (B, 1, d)."""
        row = self.decoder.backbone.embed_tokens.weight[self.config.stop_token]
        return row.to(text.dtype).expand(len(text), 1, -1)

    def _project_state(self, state: Tensor) -> Tensor:
        """One token (B, 1, d) from the normalised state (B, state_dim)."""
        limit = 1.0 if self.config.parity else STATE_LIMIT  # the released normalisation clips
        return self.state_projector(state.clamp(-limit, limit))[:, None]

    def _decode(self, read: Readout) -> Prediction:
        actions, aim = self.action_decoder(read)
        keyframe = None
        if self.keyframe_head is not None:
            keyframe = self.keyframe_head(aim).float() * self.config.keyframe_unit
        return Prediction(actions, keyframe)

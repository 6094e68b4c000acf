"""One slot per coordinate of every action, read together: the head of CogVLA's and OpenVLA-OFT's code."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vla.policy.action_decoders.action_decoder import ActionDecoder, Readout

BLOCKS = 2
"""Residual blocks of the released checkpoints."""


class CoordinateL1(ActionDecoder):
    """K x D slots, of which the D of one step are concatenated, through a residual network to one action.

    ::

        x = ReLU(W_in LN([s_1; ...; s_D]));   x <- x + ReLU(W LN(x)), twice;   a = W_out LN(x)

    A last slot stands for the end of the chunk: the STOP token of the released code, and what a keyframe is
    read from. In parity mode the states are read one place early, as the released code does in training and
    test: coordinate 0 of step 0 comes from the last prompt token, which cannot see the actions.
    """

    def __init__(self, config):
        super().__init__()
        dim, wide = config.hidden_size, config.hidden_size * config.action_dim
        self.chunk, self.coordinates = config.chunk_size, config.action_dim
        self.early = int(config.parity)
        self.norm_in, self.fc_in = nn.LayerNorm(wide), nn.Linear(wide, dim)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU()) for _ in range(BLOCKS)
        )
        self.norm_out, self.out = nn.LayerNorm(dim), nn.Linear(dim, config.action_dim)

    @property
    def slot_count(self) -> int:
        """Every coordinate of every step, and the end."""
        return self.chunk * self.coordinates + 1

    def forward(self, read: Readout) -> tuple[Tensor, Tensor]:
        """One action from D neighbouring states; see `ActionDecoder.forward`."""
        first = read.layout.prefix - self.early
        states = read.final[:, first : first + self.chunk * self.coordinates]
        x = F.relu(self.fc_in(self.norm_in(states.reshape(len(states), self.chunk, -1))))
        for block in self.blocks:
            x = x + block(x)
        return self.out(self.norm_out(x)).float(), read.final[:, -1]

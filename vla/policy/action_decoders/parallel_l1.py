"""Parallel decoding with an L1 loss: all K actions in one pass (CogVLA, arXiv 2508.21046; OpenVLA-OFT)."""

from __future__ import annotations

from torch import Tensor, nn

from vla.policy.action_decoders.action_decoder import ActionDecoder, Readout


class ParallelL1(ActionDecoder):
    """Read one action from each action slot's final state: LayerNorm, residual ReLU block, Linear.

    CogVLA spends K x D identical zero slots and reads them shifted by one; here there is one learned slot
    per step, read where it stands. One more slot, if there is a keyframe, aims.
    """

    def __init__(self, config):
        super().__init__()
        dim = config.hidden_size
        self.chunk, self.aims = config.chunk_size, bool(config.keyframe)
        self.norm_in = nn.LayerNorm(dim)
        self.block = nn.Sequential(nn.Linear(dim, dim), nn.ReLU())
        self.norm_out = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, config.action_dim)

    @property
    def slot_count(self) -> int:
        """One slot per step, and one for the keyframe if there is one."""
        return self.chunk + self.aims

    def forward(self, read: Readout) -> tuple[Tensor, Tensor]:
        """One action (D) per slot; see `ActionDecoder.forward`."""
        slots = read.slots(read.final)
        x = self.norm_in(slots[:, : self.chunk])
        return self.out(self.norm_out(x + self.block(x))).float(), slots[:, -1]

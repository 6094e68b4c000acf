"""Parallel decoding with an L1 loss: all K actions in one pass (CogVLA, arXiv 2508.21046; OpenVLA-OFT)."""

from __future__ import annotations

from torch import Tensor, nn


class ParallelL1(nn.Module):
    """Read one action from each action slot's final state: LayerNorm, residual ReLU block, Linear.

    CogVLA spends K x D identical zero slots and reads them shifted by one; here there is one learned slot
    per step, read where it stands.
    """

    def __init__(self, hidden_size: int, action_dim: int):
        super().__init__()
        self.norm_in = nn.LayerNorm(hidden_size)
        self.block = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.ReLU())
        self.norm_out = nn.LayerNorm(hidden_size)
        self.out = nn.Linear(hidden_size, action_dim)

    def forward(self, slots: Tensor) -> Tensor:
        """Slots (B, K, d) to normalised actions (B, K, D) in fp32."""
        x = self.norm_in(slots)
        return self.out(self.norm_out(x + self.block(x))).float()

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

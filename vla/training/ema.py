"""Exponential moving average of the trained weights, the ones that are evaluated and shipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightAverage:
    """The average ``ema <- d * ema + (1 - d) * weights`` over the parameters of `policy` that are trained.

    ``d = min(decay, (1 + n) / (10 + n))`` after `n` updates (the warm-up of TensorFlow's
    ``ExponentialMovingAverage``), so that a short run is not an average over its random start. Frozen
    parameters are not copied; of sharded ones every process averages its own shard.
    """

    def __init__(self, policy: nn.Module, decay: float):
        self._decay = decay
        self._trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self.start(0)

    @torch.no_grad()
    def start(self, updates: int) -> None:
        """Take the policy's present weights for the average after so many updates."""
        self._average = [_local(parameter).clone() for parameter in self._trained]
        self._updates = updates

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights; call it after every optimizer step. The first update copies them."""
        n = float(self._updates)
        decay = min(self._decay, (1.0 + n) / (10.0 + n)) if self._updates else 0.0
        torch._foreach_lerp_(self._average, [_local(parameter) for parameter in self._trained], 1.0 - decay)
        self._updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the policy has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, parameter in zip(self._average, self._trained, strict=True):
            # Values move, not storage: optimizer, DDP and FSDP hold on to the parameters as they are.
            weights = _local(parameter)
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)


def _local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter, sharing its memory."""
    detached = parameter.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached

"""Exponential moving average of the weights, the ones that are evaluated and shipped."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def average_model(policy: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of `policy` that follows it: ``ema <- d * ema + (1 - d) * policy``.

    ``d = min(decay, (1 + n) / (10 + n))`` after `n` updates (the warm-up of TensorFlow's
    ``ExponentialMovingAverage``), so that a short run is not an average over its random start.
    Call `update_parameters` after every optimizer step; ``.module`` is the averaged policy.
    """

    def follow(averaged, current, num_averaged) -> None:
        n = float(num_averaged)
        torch._foreach_lerp_(averaged, current, 1.0 - min(decay, (1.0 + n) / (10.0 + n)))

    averaged = AveragedModel(policy, multi_avg_fn=follow)
    averaged.eval().requires_grad_(False)
    return averaged

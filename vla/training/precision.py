"""Is bf16 faster here? Ask the machine once instead of guessing from its name.

bf16 halves the time of matrix products on CPUs with AVX512-BF16 or AMX and on GPUs since Ampere, and
multiplies it on CPUs that emulate it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

FLOAT32 = "float32"
BF16 = "bf16"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Context in which the forward pass runs at `precision` (weights and loss stay float32)."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == BF16)


def time_precisions(
    loss_of: Callable[[], Tensor], model: torch.nn.Module, device: torch.device, repeats: int = 3
) -> dict[str, float]:
    """Return the best seconds of forward and backward per precision; gradients are dropped afterwards."""
    seconds = {}
    for precision in (FLOAT32, BF16):
        times = []
        for _ in range(repeats + 1):  # the first one warms up
            begin = time.perf_counter()
            with autocast(precision, device):
                loss = loss_of()
            loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begin)
            model.zero_grad(set_to_none=True)
        seconds[precision] = min(times[1:])
    return seconds

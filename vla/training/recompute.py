"""Gradient checkpointing: keep what goes into a unit, compute its inside again in the backward pass."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from vla.policy.units import units


def recompute_activations(policy: nn.Module) -> None:
    """Checkpoint every unit of `policy` (`vla.policy.units`) from now on (arXiv 1604.06174).

    Nothing changes without gradients. Call it before FSDP wraps the units: it must lie outside.
    """
    for unit in units(policy):
        unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)

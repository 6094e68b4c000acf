"""Modules that are always called whole: what FSDP gathers at once and what the backward pass recomputes.

Not decoder layers: a routed layer's norms, attention and MLP are called one by one
(`vla.policy.decoder.RoutedDecoder`), so a hook on the layer itself would never run.
"""

from __future__ import annotations

from torch import nn

_KINDS = ("Attention", "MLP", "Block")


def units(policy: nn.Module) -> list[nn.Module]:
    """Return the outermost modules whose class is an attention, an MLP or a block, in the policy's order."""
    found: list[nn.Module] = []
    _collect(policy, found)
    return found


def unit_classes(policy: nn.Module) -> list[str]:
    """Return the names of their classes, sorted: what accelerate and LeRobot wrap by."""
    return sorted({type(module).__name__ for module in units(policy)})


def _collect(module: nn.Module, found: list[nn.Module]) -> None:
    for child in module.children():
        if type(child).__name__.endswith(_KINDS):
            found.append(child)
        else:
            _collect(child, found)

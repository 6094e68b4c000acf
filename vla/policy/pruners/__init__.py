"""Which vision tokens a decoder layer computes on: LFP-Routing and the pruners that it is compared with."""

from __future__ import annotations

from vla.policy.pruners.feather import Feather
from vla.policy.pruners.keep_all import KeepAll
from vla.policy.pruners.lfp import LfpRouting
from vla.policy.pruners.lfp_released import ReleasedLfpRouting
from vla.policy.pruners.pruner import Pruner
from vla.policy.pruners.pyramid_drop import PyramidDrop
from vla.policy.pruners.random_choice import RandomChoice

PRUNERS: dict[str, type[Pruner]] = {
    "lfp": LfpRouting,
    "none": KeepAll,
    "pyramid_drop": PyramidDrop,
    "feather": Feather,
    "random": RandomChoice,
}
"""Pruners by the name that a configuration uses."""

PARITY_PRUNERS: dict[str, type[Pruner]] = PRUNERS | {"lfp": ReleasedLfpRouting}
"""The same in parity mode."""

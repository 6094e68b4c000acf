"""Whether a kernel may read a module's parameters instead of calling the module.

Low-rank factors sit beside a linear layer or in a hook on it, an expert bank gives each row of a batch its
own version of a module, and sharding gathers a module's parameters when it is called: all need the call.
"""

from __future__ import annotations

from torch import nn


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether `module` is exactly one of `kinds` and a call of it does nothing but what its class says."""
    hooked = module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module)
    return type(module) in kinds and not hooked

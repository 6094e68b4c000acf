"""Triton, imported at the first launch and not before: a machine without it can use every torch path."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

TRITON_INSTALLED = find_spec("triton") is not None

#: Triton decides at its own import whether it compiles or interprets, so this is read once, too.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class TritonKernel:
    """A kernel written as a plain function, handed to `triton.jit` when it is first launched.

    The function refers to ``tl``; the name is put into its module at that moment. Launch it as
    ``kernel[grid](*arguments)``.
    """

    def __init__(self, function: Callable):
        self.function = function
        self._compiled: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return self.jit()[grid]

    def jit(self) -> Any:
        """The function as Triton's `JITFunction`."""
        if self._compiled is None:
            import triton
            import triton.language

            self.function.__globals__["tl"] = triton.language
            self._compiled = triton.jit(self.function)
        return self._compiled


def power_of_two(n: int) -> int:
    """The smallest power of two not below `n`: a Triton block's extent."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(n: int, block: int) -> int:
    """How many blocks cover `n` elements."""
    return -(-n // block)


def warps(elements: int) -> int:
    """Warps for a program whose largest tile has `elements`: about 16 of them per thread."""
    return max(4, min(16, power_of_two(elements // 512)))


def empty(like: Tensor) -> Tensor:
    """A placeholder for a gradient that nobody asked for: custom ops return no None."""
    return like.new_empty(0)


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied only if the channels of a token are not adjacent: a slice of a sequence stays a view."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`; without the microsecond that ``x.to`` takes where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which torch multiplies by `x`: autocast's where that is switched on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def in_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`tensors` in autocast's dtype where that is switched on: what torch does before its own products."""
    if not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    return tuple(tensor.to(product_dtype(tensor)) for tensor in tensors)

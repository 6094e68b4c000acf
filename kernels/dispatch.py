"""Which path an operation takes, and why.

Every operation has two paths. ``torch`` is plain torch operations, on any device, which autograd and the
compiler see through. ``triton`` is our kernel behind a `torch.library` custom op. A file of this package
holds one operation, always in this order: `reference` (fp64, independent of both paths), `torch_path`, the
Triton kernels, the custom op with its fake and autograd implementations, `dispatch`, the public function.

A custom op ``torch.ops.cogmerge.NAME`` runs wherever its tensors are: the Triton kernel where that can run,
else the same formulas in torch. So its autograd formula is checked in fp64 on any machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from vla.errors import UserError
from vla.kernels.launch import INTERPRETED, TRITON_INSTALLED, product_dtype

PATHS = ("torch", "triton")

#: Environment variable that forces one path for every operation of the process; read at import.
VARIABLE = "COGMERGE_KERNELS"
FORCED = os.environ.get(VARIABLE) or None

#: Operations whose Triton path is taken without being asked for. An operation enters this set when a whole
#: captured policy step got faster with it on a real GPU; a won micro-benchmark is not enough.
#: ``scripts/gpu_check`` measures it and prints the set. That has not been done yet, so the set is empty.
QUALIFIED: frozenset[str] = frozenset()

#: Rows beyond which an H200 computes a product longer than it reads the weight: 790 TFLOP/s over 4.3 TB/s.
MOST_PRODUCT_ROWS = 192

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Choice(NamedTuple):
    """The path that a call takes (one of `PATHS`) and the reason, as a clause a reader can act on."""

    path: str
    reason: str


@contextmanager
def qualified(ops: Iterable[str]) -> Iterator[None]:
    """Inside the block exactly `ops` are `QUALIFIED`: what a measurement of whole steps switches."""
    global QUALIFIED
    before, QUALIFIED = QUALIFIED, frozenset(ops)
    try:
        yield
    finally:
        QUALIFIED = before


def triton_refusal(tensor: Tensor) -> str | None:
    """Why no Triton kernel can run on `tensor`, or None where one can.

    A CUDA device is needed, or Triton's interpreter (``TRITON_INTERPRET=1`` before the first import), which
    runs on the CPU and is a correctness tool only.
    """
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if tensor.device.type != "cuda" and not INTERPRETED:
        return f"the tensors are on {tensor.device.type} and Triton needs a CUDA device"
    if tensor.dtype not in TRITON_DTYPES:
        return f"the Triton kernels do not take {tensor.dtype}"
    return None


def product_refusal(x: Tensor, weight: Tensor) -> str | None:
    """Why no Triton kernel can multiply rows `x` by `weight`, or None where one can.

    They are of one dtype, or will be, because autocast is on.
    """
    refusal = triton_refusal(x)
    if refusal is None and product_dtype(x) != product_dtype(weight):
        return f"the weights are {weight.dtype} and the rows {x.dtype}"
    return refusal


def product_unsuited(rows: int, x: Tensor, weight: Tensor) -> str | None:
    """Why torch multiplies `rows` rows of `x` by `weight` better than a kernel bound by reading it."""
    if rows > MOST_PRODUCT_ROWS:
        return f"{rows} rows are more than {MOST_PRODUCT_ROWS}: computing binds and cuBLAS computes best"
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return "training needs what torch keeps for its own backward"
    return None


def choose(op: str, refusal: str | None, path: str | None = None, unsuited: str | None = None) -> Choice:
    """Choose the path of operation `op`, whose Triton path says `refusal` (None: it can run).

    `unsuited` is why torch serves this call better although Triton could: it counts where nothing is forced.
    `path`, else the environment variable `COGMERGE_KERNELS`, forces one. Raises `UserError` for an unknown
    path and for a forced Triton path that cannot run: a benchmark must not measure the wrong kernel.
    """
    source = "the caller" if path else VARIABLE
    wish = path or FORCED
    if wish is None:
        if refusal is not None:
            return Choice("torch", refusal)
        if unsuited is not None:
            return Choice("torch", unsuited)
        if INTERPRETED:
            return Choice("torch", "Triton's interpreter is for tests and runs only when forced")
        if op not in QUALIFIED:
            return Choice("torch", f"no end-to-end gain of the Triton {op} is on record")
        return Choice("triton", f"the Triton {op} made a captured policy step faster")
    if wish not in PATHS:
        raise UserError(f"{op}: no path '{wish}' (asked for by {source}); choose one of {', '.join(PATHS)}.")
    if wish == "triton" and refusal is not None:
        raise UserError(f"{op}: {source} forces the Triton path, but {refusal}; force 'torch' or nothing.")
    return Choice(wish, f"forced by {source}")

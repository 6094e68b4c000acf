"""K4, third part: the projection that ends an attention or an MLP, and its residual, in one launch.

For rows ``x`` of few observations and a weight (D, f) without bias, as Llama and Qwen have them::

    y = r + x W'

Few rows make few programs: tiles have as many columns as leave every processor one. Backward::

    dr = dy,   dx = dy W,   dW = dy' x

The Triton path has run in the interpreter and been compiled for sm_90; it has not been timed on a GPU yet.
The policy calls it behind the MLP of its dense layers (`vla.policy.layer_parts`): in front of every MLP the
residual is part of `add_film_norm`, and behind that of a routed layer part of `scatter_residual`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.errors import UserError
from vla.kernels.dispatch import Choice, choose, product_refusal, product_unsuited
from vla.kernels.launch import INTERPRETED, TritonKernel, cdiv, in_autocast, power_of_two

if TYPE_CHECKING:
    import triton.language as tl

PROCESSORS = 132  # of an H200
ROWS, COLUMNS, DEPTH = 128, 64, 64  # of a tile, at most


def reference(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The formula in fp64; arguments and result as in `product_residual`."""
    return residual.double() + torch.einsum("...f,df->...d", x.double(), weight.double())


def torch_path(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The same with torch; differentiable by autograd."""
    return residual + F.linear(x, weight)


def _product_kernel(
    residual, x, weight, out, rows, inputs, outputs,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    summed = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, inputs, DEPTH):
        k = (start + tl.arange(0, DEPTH))[None, :]
        value = tl.load(x + row * inputs + k, (row < rows) & (k < inputs), 0.0)
        w = tl.load(weight + col[:, None] * inputs + k, (col < outputs)[:, None] & (k < inputs), 0.0)
        if WIDEN:  # the interpreter multiplies bf16 bit patterns
            value, w = value.to(tl.float32), w.to(tl.float32)
        summed += tl.dot(value, tl.trans(w), input_precision="ieee")
    at, real = row * outputs + col[None, :], (row < rows) & (col < outputs)[None, :]
    summed += tl.load(residual + at, real, 0.0).to(tl.float32)
    tl.store(out + at, summed.to(out.dtype.element_ty), real)


PRODUCT_KERNEL = TritonKernel(_product_kernel)


@torch.library.custom_op(
    "cogmerge::product_residual",
    mutates_args=(),
    schema="(Tensor residual, Tensor x, Tensor weight) -> Tensor",
)
def _op(residual, x, weight):
    outputs, inputs = weight.shape
    if product_refusal(x, weight) is not None:
        work = torch.promote_types(residual.dtype, torch.float32)
        return torch_path(residual.to(work), x.to(work), weight.to(work)).to(residual.dtype)
    residual, x, weight = residual.contiguous(), x.contiguous(), weight.contiguous()
    y, rows = torch.empty_like(residual), x.numel() // inputs
    tile, depth = max(16, min(ROWS, power_of_two(rows))), max(16, min(DEPTH, power_of_two(inputs)))
    columns = max(16, min(COLUMNS, power_of_two(outputs // PROCESSORS + 1) // 2))
    if rows:
        PRODUCT_KERNEL[(cdiv(outputs, columns), cdiv(rows, tile))](
            residual, x, weight, y, rows, inputs, outputs, INTERPRETED, tile, columns, depth,
            num_warps=8 if tile == ROWS else 4,
        )  # fmt: skip
    return y


@_op.register_fake
def _fake(residual, x, weight):
    return residual.new_empty(residual.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    work = torch.promote_types(x.dtype, torch.float32)
    wide, rows = dy.to(work), x.to(work).flatten(0, -2)
    dweight = wide.flatten(0, -2).T @ rows
    return dy.clone(), (wide @ weight.to(work)).to(x.dtype), dweight.to(weight.dtype)


_op.register_autograd(_backward, setup_context=_setup_context)


def dispatch(x: Tensor, weight: Tensor, path: str | None = None) -> Choice:
    """The path that `product_residual` takes for rows `x` and the weight, and why."""
    unsuited = product_unsuited(x.numel() // max(x.shape[-1], 1), x, weight)
    return choose("product_residual", product_refusal(x, weight), path, unsuited)


def product_residual(residual: Tensor, x: Tensor, weight: Tensor, path: str | None = None) -> Tensor:
    """``residual + x weight'``: rows `x` (..., f), `weight` (D, f) and `residual` (..., D) to (..., D).

    `x` and `weight` are of one dtype; the result has that of `residual`, which may be wider. Raises
    `UserError` for other shapes or a `path` that cannot run.
    """
    if (
        weight.ndim != 2
        or x.ndim < 2
        or residual.shape != (*x.shape[:-1], len(weight))
        or (x.shape[-1] != weight.shape[1])
    ):
        raise UserError(
            f"product_residual: residual {tuple(residual.shape)}, x {tuple(x.shape)} and weight "
            f"{tuple(weight.shape)} must be (..., D), (..., f) and (D, f)."
        )
    x, weight = in_autocast(x, weight)
    if dispatch(x, weight, path).path == "torch":
        return torch_path(residual, x, weight)
    return torch.ops.cogmerge.product_residual(residual, x, weight)

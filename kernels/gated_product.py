"""K4, first part: gate and up projection of a SwiGLU MLP and their product, in one launch.

For rows ``x`` of few observations, and two weights (f, d) without bias, as Llama and Qwen have them::

    y = silu(x W_gate') * (x W_up'),   silu(a) = a / (1 + exp(-a))

Below about 184 rows a GPU spends the time on reading the weights. Two products and a pointwise kernel read
them once, too, but write and read two (N, f) intermediates and leave gaps between launches; here a program
holds both sums of its columns until they are multiplied. Backward, with ``g`` and ``u`` the two products::

    dg = dy * u * sigma(g) (1 + g (1 - sigma(g))),   du = dy * silu(g)
    dx = dg W_gate + du W_up,   dW_gate = dg' x,   dW_up = du' x

The Triton path has run in the interpreter and been compiled for sm_90; it has not been timed on a GPU yet.
What it has to beat there is two cuBLAS products and a pointwise kernel in a captured graph. Where torch is
chosen the policy calls the MLP's module (`vla.policy.layer_parts`).
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

ROWS, COLUMNS, DEPTH = 128, 64, 64  # of a tile, at most


def reference(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The formula in fp64; arguments and result as in `gated_product`."""
    g, u = (torch.einsum("...d,fd->...f", x.double(), weight.double()) for weight in (gate, up))
    return g / (1 + torch.exp(-g)) * u


def torch_path(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The same with torch; differentiable by autograd."""
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def _gated_kernel(
    x, gate, up, out, rows, inputs, outputs,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    gated = tl.zeros([ROWS, COLUMNS], tl.float32)
    upped = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, inputs, DEPTH):
        k = (start + tl.arange(0, DEPTH))[None, :]
        value = tl.load(x + row * inputs + k, (row < rows) & (k < inputs), 0.0)
        at, inside = col[:, None] * inputs + k, (col < outputs)[:, None] & (k < inputs)
        g, u = tl.load(gate + at, inside, 0.0), tl.load(up + at, inside, 0.0)
        if WIDEN:  # the interpreter multiplies bf16 bit patterns
            value, g, u = value.to(tl.float32), g.to(tl.float32), u.to(tl.float32)
        gated += tl.dot(value, tl.trans(g), input_precision="ieee")
        upped += tl.dot(value, tl.trans(u), input_precision="ieee")
    result = gated / (1 + tl.exp(-gated)) * upped
    real = (row < rows) & (col < outputs)[None, :]
    tl.store(out + row * outputs + col[None, :], result.to(out.dtype.element_ty), real)


GATED_KERNEL = TritonKernel(_gated_kernel)


@torch.library.custom_op(
    "cogmerge::gated_product", mutates_args=(), schema="(Tensor x, Tensor gate, Tensor up) -> Tensor"
)
def _op(x, gate, up):
    outputs, inputs = gate.shape
    if product_refusal(x, gate) is not None:
        g, u = _products(x, gate, up)
        return (F.silu(g) * u).to(x.dtype)
    x, gate, up = x.contiguous(), gate.contiguous(), up.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    rows = x.numel() // inputs
    tile, depth = max(16, min(ROWS, power_of_two(rows))), max(16, min(DEPTH, power_of_two(inputs)))
    columns = max(16, min(COLUMNS, power_of_two(outputs)))
    if rows:
        GATED_KERNEL[(cdiv(outputs, columns), cdiv(rows, tile))](
            x, gate, up, y, rows, inputs, outputs, INTERPRETED, tile, columns, depth,
            num_warps=8 if tile == ROWS else 4,
        )  # fmt: skip
    return y


def _products(x, gate, up):
    """``g`` and ``u`` in at least fp32."""
    work = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(work), gate.to(work)), F.linear(x.to(work), up.to(work))


@_op.register_fake
def _fake(x, gate, up):
    return x.new_empty(*x.shape[:-1], gate.shape[0])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    x, gate, up = ctx.saved_tensors
    g, u = _products(x, gate, up)
    sigma, dy = g.sigmoid(), dy.to(g.dtype)
    dg, du = dy * u * sigma * (1 + g * (1 - sigma)), dy * g * sigma
    dx = dg @ gate.to(g.dtype) + du @ up.to(g.dtype)
    rows = x.to(g.dtype).flatten(0, -2)
    dgate, dup = dg.flatten(0, -2).T @ rows, du.flatten(0, -2).T @ rows
    return dx.to(x.dtype), dgate.to(gate.dtype), dup.to(up.dtype)


_op.register_autograd(_backward, setup_context=_setup_context)


def dispatch(x: Tensor, gate: Tensor, path: str | None = None) -> Choice:
    """The path that `gated_product` takes for rows `x` and the weight `gate`, and why."""
    unsuited = product_unsuited(x.numel() // max(x.shape[-1], 1), x, gate)
    return choose("gated_product", product_refusal(x, gate), path, unsuited)


def gated_product(x: Tensor, gate: Tensor, up: Tensor, path: str | None = None) -> Tensor:
    """``silu(x gate') * (x up')``: rows `x` (..., d) and weights (f, d) of one dtype to (..., f).

    Raises `UserError` for other shapes or a `path` that cannot run.
    """
    if x.ndim < 2 or gate.ndim != 2 or gate.shape != up.shape or gate.shape[1] != x.shape[-1]:
        raise UserError(
            f"gated_product: x {tuple(x.shape)}, gate {tuple(gate.shape)} and up {tuple(up.shape)} must be"
            " (..., d) and twice (f, d)."
        )
    if gate.dtype != up.dtype:
        raise UserError(
            f"gated_product: gate is {gate.dtype} and up is {up.dtype}; they must be of one dtype."
        )
    x, gate, up = in_autocast(x, gate, up)
    if dispatch(x, gate, path).path == "torch":
        return torch_path(x, gate, up)
    return torch.ops.cogmerge.gated_product(x, gate, up)

"""K3, second half: put what the routed layer computed back among the tokens that skipped it.

With one row per kept token::

    out[index_j] = residual_j + gate_j * update_j,   out = x elsewhere

`residual` is the stream after attention, `update` the MLP's output, `gate` the router's (1 where none is
given): the layer's last residual, its gate and the scatter in one launch. Backward::

    dx = dout, 0 at index;   dresidual_j = dout[index_j]
    dupdate_j = gate_j * dout[index_j];   dgate_j = sum_d dout[index_j] * update_j

`scatter_residual` returns a new tensor, for training. `scatter_residual_` writes into `x`, touching only the
kept rows, for inference in fixed buffers. Indices are unique, so nothing is added up by atomics. The Triton
path has run in the interpreter and been compiled for sm_90; it has not been timed on a GPU yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vla.errors import UserError
from vla.kernels.dispatch import Choice, choose, triton_refusal
from vla.kernels.launch import TritonKernel, as_dtype, power_of_two, warps

if TYPE_CHECKING:
    import triton.language as tl

WIDEST = 16384  # channels: one row must fit the registers of one program


def reference(
    x: Tensor, index: Tensor, residual: Tensor, update: Tensor, gate: Tensor | None = None
) -> Tensor:
    """The formula in fp64; arguments and result as in `scatter_residual`."""
    update = update.double() if gate is None else gate.double()[..., None] * update.double()
    kept = residual.double() + update
    out = x.double().unbind()
    return torch.stack([o.index_put((i,), row) for o, i, row in zip(out, index, kept, strict=True)])


def torch_path(x: Tensor, index: Tensor, residual: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    """The same with torch's scatter; differentiable by autograd."""
    return x.scatter(1, index[..., None].expand_as(update), _kept(residual, update, gate))


def _kept(residual: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    work = torch.promote_types(residual.dtype, torch.float32)
    update = as_dtype(update, work)
    if gate is not None:
        update = as_dtype(gate, work)[..., None] * update
    return as_dtype(as_dtype(residual, work) + update, residual.dtype)


def _scatter_kernel(
    x, index, residual, update, gate, x_sample, x_token, k, width, GATE: tl.constexpr, BLOCK: tl.constexpr
):
    sample, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    col = tl.arange(0, BLOCK)
    channel = col < width
    at = (sample * k + slot) * width + col
    row = tl.load(update + at, mask=channel, other=0.0).to(tl.float32)
    if GATE:
        row *= tl.load(gate + sample * k + slot).to(tl.float32)
    row += tl.load(residual + at, mask=channel, other=0.0).to(tl.float32)
    token = tl.load(index + sample * k + slot)
    out = x + sample * x_sample + token * x_token + col
    tl.store(out, row.to(x.dtype.element_ty), mask=channel)


SCATTER_KERNEL = TritonKernel(_scatter_kernel)


def _write(x: Tensor, index: Tensor, residual: Tensor, update: Tensor, gate: Tensor | None) -> None:
    """Overwrite the kept rows of `x`."""
    if _refusal(x) is not None:
        x.scatter_(1, index[..., None].expand_as(update), _kept(residual, update, gate))
        return
    index, residual, update = index.contiguous(), residual.contiguous(), update.contiguous()
    gate = None if gate is None else gate.contiguous()
    batch, k, width = update.shape
    SCATTER_KERNEL[(batch, k)](
        x, index, residual, update, gate, x.stride(0), x.stride(1), k, width,
        gate is not None, power_of_two(width), num_warps=warps(power_of_two(width)),
    )  # fmt: skip


SCHEMA = "(Tensor{} x, Tensor index, Tensor residual, Tensor update, Tensor? gate) -> {}"


@torch.library.custom_op(
    "cogmerge::scatter_residual", mutates_args=(), schema=SCHEMA.format("", "(Tensor out)")
)
def _op(x, index, residual, update, gate):
    out = x.clone(memory_format=torch.contiguous_format)
    _write(out, index, residual, update, gate)
    return out


@_op.register_fake
def _fake(x, index, residual, update, gate):
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "cogmerge::scatter_residual_", mutates_args=("x",), schema=SCHEMA.format("(a!)", "()")
)
def _op_in_place(x, index, residual, update, gate):
    _write(x, index, residual, update, gate)


@_op_in_place.register_fake
def _fake_in_place(x, index, residual, update, gate):
    return None


def _setup_context(ctx, inputs, output):
    _, index, _, update, gate = inputs
    ctx.save_for_backward(index, update, gate)


def _backward(ctx, dout):
    index, update, gate = ctx.saved_tensors
    wide = index[..., None].expand_as(update)
    dresidual = dout.gather(1, wide)
    dx = dout.scatter(1, wide, 0.0)
    if gate is None:
        return dx, None, dresidual, dresidual.to(update.dtype), None
    work = torch.promote_types(dout.dtype, torch.float32)
    dkept = dresidual.to(work)
    dgate = (dkept * update.to(work)).sum(-1).to(gate.dtype)
    dupdate = (gate.to(work)[..., None] * dkept).to(update.dtype)
    return dx, None, dresidual, dupdate, dgate


_op.register_autograd(_backward, setup_context=_setup_context)


def dispatch(x: Tensor, path: str | None = None) -> Choice:
    """The path that `scatter_residual` and `scatter_residual_` take for `x`, and why."""
    return choose("scatter_residual", _refusal(x), path)


def _refusal(x: Tensor) -> str | None:
    if x.shape[2] > WIDEST:
        return f"a row of {x.shape[2]} channels exceeds {WIDEST}"
    if x.stride(2) != 1 and x.shape[2] > 1:
        return "the channels of a token are not adjacent in memory"
    return triton_refusal(x)


def scatter_residual(
    x: Tensor,
    index: Tensor,
    residual: Tensor,
    update: Tensor,
    gate: Tensor | None = None,
    path: str | None = None,
) -> Tensor:
    """Return `x` (B, V, D) with the rows at `index` replaced by ``residual + gate * update``.

    `index` (B, k) int64, in range and unique per sample (not checked: that would read device data);
    `residual` (B, k, D) of x's dtype; `update` (B, k, D), under autocast narrower; `gate` (B, k).
    Raises `UserError` for other shapes or dtypes, or a `path` that cannot run.
    """
    _check(x, index, residual, update, gate)
    if dispatch(x, path).path == "torch":
        return torch_path(x, index, residual, update, gate)
    return torch.ops.cogmerge.scatter_residual(x, index, residual, update, gate)


def scatter_residual_(
    x: Tensor,
    index: Tensor,
    residual: Tensor,
    update: Tensor,
    gate: Tensor | None = None,
    path: str | None = None,
) -> Tensor:
    """Like `scatter_residual`, but write into `x` and return it; `x` may be a slice of a sequence.

    For inference: raises `UserError` where a gradient would be needed.
    """
    _check(x, index, residual, update, gate)
    tensors = [t for t in (x, residual, update, gate) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise UserError("scatter_residual_: it has no gradient; use scatter_residual, or torch.no_grad().")
    if dispatch(x, path).path == "torch":
        return x.scatter_(1, index[..., None].expand_as(update), _kept(residual, update, gate))
    torch.ops.cogmerge.scatter_residual_(x, index, residual, update, gate)
    return x


def _check(x, index, residual, update, gate):
    if x.ndim != 3 or index.ndim != 2 or len(index) != len(x) or index.dtype != torch.int64:
        raise UserError(
            f"scatter_residual: x {tuple(x.shape)} and index {index.dtype} {tuple(index.shape)} must be "
            "(B, V, D) and int64 (B, k)."
        )
    rows = (*index.shape, x.shape[2])
    for name, tensor, wanted in (
        ("residual", residual, rows),
        ("update", update, rows),
        ("gate", gate, rows[:2]),
    ):
        if tensor is not None and tensor.shape != wanted:
            raise UserError(f"scatter_residual: {name} has shape {tuple(tensor.shape)}, not {wanted}.")
    if residual.dtype != x.dtype:
        raise UserError(
            f"scatter_residual: x and residual have dtypes {x.dtype} and {residual.dtype}; they must be one."
        )

"""K3, first half: gather the kept tokens and normalise them for the routed layer's attention.

With ``c_j = x[index_j]`` and ``n_j = c_j * rstd[index_j]`` (RMSNorm without its weight)::

    chosen_j = c_j                        the residual stream of the routed layer
    y_j = gate_j * n_j * g                its attention's input; gate 1 where none is given

``rstd`` was computed by `film_route_select` in the pass that scored the tokens, so no second reduction over
the channels. Backward, ``rstd`` counted as the function of x that it is, ``m(.)`` the mean over channels::

    dn = gate * dy * g
    dx[index_j] = dchosen_j + rstd * (dn - n * m(dn * n)),   0 for tokens not kept
    dg = sum gate * dy * n,   dgate_j = sum_d dy * n * g

Indices are unique, so nothing is added up by atomics. The Triton path has run in the interpreter and been
compiled for sm_90; it has not been timed on a GPU yet. The policy calls it where `film_route_select` left it
an rstd, and the norm's module otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vla.errors import UserError
from vla.kernels.dispatch import Choice, choose, triton_refusal
from vla.kernels.launch import TritonKernel, power_of_two, unit_stride, warps

if TYPE_CHECKING:
    import triton.language as tl

WIDEST = 16384  # channels: one row must fit the registers of one program


def reference(
    x: Tensor, index: Tensor, weight: Tensor, gate: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The formula in fp64, with rstd from x itself; results as in `select_gather_norm`."""
    chosen = torch.stack([sample[kept] for sample, kept in zip(x.double(), index, strict=True)])
    y = chosen / (chosen.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return chosen, y if gate is None else gate.double()[..., None] * y


def torch_path(
    x: Tensor, index: Tensor, rstd: Tensor, weight: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same with torch's gather; differentiable by autograd, also through the given rstd."""
    work = rstd.dtype
    chosen = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
    inverse = _with_gradient(chosen.to(work), rstd.gather(1, index)[..., None])
    y = chosen.to(work) * inverse * weight.to(work)
    return chosen, (y if gate is None else y * gate.to(work)[..., None]).to(x.dtype)


def _with_gradient(chosen: Tensor, inverse: Tensor) -> Tensor:
    """`inverse`, (mean chosen^2 + eps)^-1/2, with the gradient that computing it here would have.

    ``d rstd = -rstd^3 * mean(c dc)``: linear in mean(c^2), whose own value is taken away again.
    """
    if not torch.is_grad_enabled() or not chosen.requires_grad:
        return inverse
    inverse = inverse.detach()
    power = chosen.square().mean(-1, keepdim=True)
    return inverse - 0.5 * inverse**3 * (power - power.detach())


def _gather_kernel(
    x, index, rstd, weight, gate, chosen, y, x_sample, x_token, tokens, k, width,
    GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    col = tl.arange(0, BLOCK)
    channel = col < width
    token = tl.load(index + sample * k + slot)
    kept = tl.load(x + sample * x_sample + token * x_token + col, mask=channel, other=0.0)
    out = (sample * k + slot) * width + col
    tl.store(chosen + out, kept, mask=channel)
    scale = tl.load(rstd + sample * tokens + token)
    if GATE:
        scale *= tl.load(gate + sample * k + slot).to(tl.float32)
    g = tl.load(weight + col, mask=channel, other=0.0).to(tl.float32)
    tl.store(y + out, (kept.to(tl.float32) * scale * g).to(y.dtype.element_ty), mask=channel)


GATHER_KERNEL = TritonKernel(_gather_kernel)


@torch.library.custom_op(
    "cogmerge::select_gather_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor index, Tensor rstd, Tensor weight, Tensor? gate) -> (Tensor chosen, Tensor y)",
)
def _op(x, index, rstd, weight, gate):
    if _refusal(x) is not None:
        return torch_path(x, index, rstd, weight, gate)
    (batch, tokens, width), k = x.shape, index.shape[1]
    x = unit_stride(x)
    index, rstd, weight = index.contiguous(), rstd.contiguous(), weight.contiguous()
    gate = None if gate is None else gate.contiguous()
    chosen, y = x.new_empty(batch, k, width), x.new_empty(batch, k, width)
    GATHER_KERNEL[(batch, k)](
        x, index, rstd, weight, gate, chosen, y, x.stride(0), x.stride(1), tokens, k, width,
        gate is not None, power_of_two(width), num_warps=warps(power_of_two(width)),
    )  # fmt: skip
    return chosen, y


@_op.register_fake
def _fake(x, index, rstd, weight, gate):
    shape = (*index.shape, x.shape[-1])
    return x.new_empty(shape), x.new_empty(shape)


def _setup_context(ctx, inputs, output):
    x, index, rstd, weight, gate = inputs
    ctx.save_for_backward(index, rstd, weight, gate, output[0])
    ctx.shape = x.shape


def _backward(ctx, dchosen, dy):
    index, rstd, weight, gate, chosen = ctx.saved_tensors
    work, wide = rstd.dtype, index[..., None].expand_as(chosen)
    inverse = rstd.gather(1, index)[..., None]
    n, dy, g = chosen.to(work) * inverse, dy.to(work), weight.to(work)
    dgate = None if gate is None else (dy * n * g).sum(-1).to(gate.dtype)
    dy = dy if gate is None else dy * gate.to(work)[..., None]
    dn = dy * g
    kept = dchosen.to(work) + inverse * (dn - n * (dn * n).mean(-1, keepdim=True))
    dx = chosen.new_zeros(ctx.shape).scatter(1, wide, kept.to(chosen.dtype))
    return dx, None, None, (dy * n).sum((0, 1)).to(weight.dtype), dgate


_op.register_autograd(_backward, setup_context=_setup_context)


def dispatch(x: Tensor, path: str | None = None) -> Choice:
    """The path that `select_gather_norm` takes for `x`, and why."""
    return choose("select_gather_norm", _refusal(x), path)


def _refusal(x: Tensor) -> str | None:
    if x.shape[2] > WIDEST:
        return f"a row of {x.shape[2]} channels exceeds {WIDEST}"
    return triton_refusal(x)


def select_gather_norm(
    x: Tensor,
    index: Tensor,
    rstd: Tensor,
    weight: Tensor,
    gate: Tensor | None = None,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather ``chosen = x[index]`` and ``y = gate * RMSNorm(chosen)``, each (B, k, D) of x's dtype.

    `x` (B, V, D); `index` (B, k) int64, in range and unique per sample (not checked: that would read device
    data); `rstd` (B, V), both from `film_route_select` on the same `x`; `weight` (D) of the norm; `gate`
    (B, k). Raises `UserError` for other shapes or a `path` that cannot run.
    """
    if x.ndim != 3 or index.ndim != 2 or len(index) != len(x) or index.dtype != torch.int64:
        raise UserError(
            f"select_gather_norm: x {tuple(x.shape)} and index {index.dtype} {tuple(index.shape)} must be "
            "(B, V, D) and int64 (B, k)."
        )
    wanted = {"rstd": tuple(x.shape[:2]), "weight": (x.shape[2],), "gate": tuple(index.shape)}
    for name, tensor in zip(wanted, (rstd, weight, gate), strict=True):
        if tensor is not None and tuple(tensor.shape) != wanted[name]:
            raise UserError(
                f"select_gather_norm: {name} has shape {tuple(tensor.shape)}, not {wanted[name]}."
            )
    if dispatch(x, path).path == "torch":
        return torch_path(x, index, rstd, weight, gate)
    return torch.ops.cogmerge.select_gather_norm(x, index, rstd, weight, gate)

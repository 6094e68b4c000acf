"""K1: residual, FiLM and norm in one pass over the tokens.

With ``s = x + a`` (residual) and one scale and shift per sample::

    h = (1 + gamma_b) * s + beta_b                  FiLM between residual and norm (EFA-Routing)
    n = (h - mean h) * rstd   or   h * rstd         LayerNorm or RMSNorm, rstd = (var + eps)^-1/2
    y = n * w + b

Without gamma and beta it is the residual and the norm alone. Both `h` (the new residual stream) and `y` (the
MLP's input) leave. Norms that fuse a modulation apply it after the norm; CogVLA applies it before, which is
why no library has this one. Backward, with ``m(.)`` the mean over channels::

    dn = dy * w
    g  = dh + rstd * (dn - m(dn) - n * m(dn * n))   without m(dn) for RMSNorm
    dx = da = (1 + gamma) * g
    dgamma_b = sum_n g * s,  dbeta_b = sum_n g,  dw = sum dy * n,  db = sum dy

The sums over tokens run in two stages (partial sums per block of rows, then a plain sum): no atomics, so the
same bits every time. The Triton path has run in the interpreter and been compiled for sm_90; it has not been
timed on a GPU yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.errors import UserError
from vla.kernels.dispatch import Choice, choose, triton_refusal
from vla.kernels.launch import TritonKernel, as_dtype, cdiv, empty, power_of_two, warps

if TYPE_CHECKING:
    import triton.language as tl

CONTIGUOUS = torch.contiguous_format
NORMS = ("rms", "layer")
WIDEST = 16384  # channels: one row must fit the registers of one program
TILE = 4096  # elements a forward program works on
BACKWARD_ROWS = 16  # rows a backward program sums before it writes its share


def reference(
    x: Tensor,
    a: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The formula in fp64; arguments and results as in `add_film_norm`."""
    h = x.double() + a.double()
    if gamma is not None:
        h = (1 + gamma.double()[:, None]) * h + beta.double()[:, None]
    centred = h - h.mean(-1, keepdim=True) if norm == "layer" else h
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        y = y * weight.double()
    return h, y if bias is None else y + bias.double()


def torch_path(
    x: Tensor,
    a: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The same with torch's own norms, in at least fp32; differentiable by autograd."""
    work = torch.promote_types(x.dtype, torch.float32)
    h = _residual_film(x, a, gamma, beta, work)
    weight, bias = (None if p is None else as_dtype(p, work) for p in (weight, bias))
    wide = as_dtype(h, work)
    if norm == "layer":
        y = F.layer_norm(wide, wide.shape[-1:], weight, bias, eps)
    else:
        y = F.rms_norm(wide, wide.shape[-1:], weight, eps)
        y = y if bias is None else y + bias
    return h, as_dtype(y, x.dtype)


def _residual_film(
    x: Tensor, a: Tensor, gamma: Tensor | None, beta: Tensor | None, work: torch.dtype
) -> Tensor:
    s = as_dtype(x, work) + as_dtype(a, work)
    if gamma is not None:
        s = s + as_dtype(gamma, work)[:, None] * s + as_dtype(beta, work)[:, None]
    return as_dtype(s, x.dtype)


def _forward_kernel(
    x, a, gamma, beta, weight, bias, h, y, stats, rows, per_sample, width, eps,
    FILM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, CENTERED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    at = row[:, None] * width + col[None, :]
    # Up to fp32 right after every load: the interpreter adds bf16 wrongly, a GPU would round twice.
    s = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    s += tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    if FILM:
        sample = (row // per_sample)[:, None] * width + col[None, :]
        scale = tl.load(gamma + sample, mask=inside, other=0.0).to(tl.float32)
        s += scale * s + tl.load(beta + sample, mask=inside, other=0.0).to(tl.float32)
    # The norm reads what the next layer will read: the rounded stream.
    rounded = s.to(h.dtype.element_ty)
    tl.store(h + at, rounded, mask=inside)
    n = rounded.to(tl.float32)
    if CENTERED:
        mean = tl.sum(n, axis=1) / width
        n = tl.where(inside, n - mean[:, None], 0.0)
        tl.store(stats + 2 * row, mean, mask=row < rows)
    else:
        tl.store(stats + 2 * row, tl.zeros([ROWS], tl.float32), mask=row < rows)
    rstd = 1.0 / tl.sqrt(tl.sum(n * n, axis=1) / width + eps)
    tl.store(stats + 2 * row + 1, rstd, mask=row < rows)
    n *= rstd[:, None]
    if WEIGHT:
        n *= tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        n += tl.load(bias + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, n.to(y.dtype.element_ty), mask=inside)


def _backward_kernel(
    dh, dy, x, a, gamma, weight, h, stats, ds, partial, per_sample, width,
    FILM: tl.constexpr, WEIGHT: tl.constexpr, CENTERED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    col = tl.arange(0, BLOCK)
    channel = col < width
    dgamma, dbeta = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    dweight, dbias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        within = chunk * ROWS + i
        real = within < per_sample
        inside = channel & real
        row = sample * per_sample + within
        at = row * width + col
        mean = tl.load(stats + 2 * row, mask=real, other=0.0)
        rstd = tl.load(stats + 2 * row + 1, mask=real, other=0.0)
        wide = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        n = tl.where(inside, (wide - mean) * rstd, 0.0)
        outer = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        dweight += outer * n
        dbias += outer
        if WEIGHT:
            outer *= tl.load(weight + col, mask=channel, other=0.0).to(tl.float32)
        inner = outer - n * (tl.sum(outer * n, axis=0) / width)
        if CENTERED:
            inner -= tl.sum(outer, axis=0) / width
        grad = tl.load(dh + at, mask=inside, other=0.0).to(tl.float32) + inner * rstd
        if FILM:
            s = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            s += tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
            dgamma += tl.where(inside, grad * s, 0.0)
            dbeta += tl.where(inside, grad, 0.0)
            scale = tl.load(gamma + sample * width + col, mask=channel, other=0.0).to(tl.float32)
            grad += scale * grad
        tl.store(ds + at, grad.to(ds.dtype.element_ty), mask=inside)
    share = partial + (sample * tl.num_programs(1) + chunk) * 4 * width + col
    tl.store(share, dgamma, mask=channel)
    tl.store(share + width, dbeta, mask=channel)
    tl.store(share + 2 * width, dweight, mask=channel)
    tl.store(share + 3 * width, dbias, mask=channel)


FORWARD_KERNEL, BACKWARD_KERNEL = TritonKernel(_forward_kernel), TritonKernel(_backward_kernel)


@torch.library.custom_op(
    "cogmerge::add_film_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor a, Tensor? gamma, Tensor? beta, Tensor? weight, Tensor? bias, bool centered, "
    "float eps) -> (Tensor h, Tensor y, Tensor stats)",
)
def _op(x, a, gamma, beta, weight, bias, centered, eps):
    """h, y and the statistics (B, N, 2): mean (0 for RMSNorm) and rstd of each row."""
    x, a, gamma, beta, weight, bias = _contiguous(x, a, gamma, beta, weight, bias)
    if _refusal(x) is not None:
        return _forward_torch(x, a, gamma, beta, weight, bias, centered, eps)
    batch, per_sample, width = x.shape
    h, y = torch.empty_like(x), torch.empty_like(x)
    stats = x.new_empty(batch, per_sample, 2, dtype=torch.float32)
    block = power_of_two(width)
    rows = max(1, min(TILE // block, power_of_two(batch * per_sample)))
    if x.numel():
        FORWARD_KERNEL[(cdiv(batch * per_sample, rows),)](
            x, a, gamma, beta, weight, bias, h, y, stats, batch * per_sample, per_sample, width, eps,
            gamma is not None, weight is not None, bias is not None, centered, rows, block,
            num_warps=warps(rows * block),
        )  # fmt: skip
    return h, y, stats


def _forward_torch(x, a, gamma, beta, weight, bias, centered, eps):
    work = torch.promote_types(x.dtype, torch.float32)
    h = _residual_film(x, a, gamma, beta, work)
    n = h.to(work)
    mean = n.mean(-1) if centered else n.new_zeros(n.shape[:-1])
    n = n - mean[..., None]
    rstd = (n.square().mean(-1) + eps).rsqrt()
    y = n * rstd[..., None]
    y = y if weight is None else y * weight.to(work)
    y = y if bias is None else y + bias.to(work)
    return h, y.to(x.dtype), torch.stack([mean, rstd], -1)


@_op.register_fake
def _fake(x, a, gamma, beta, weight, bias, centered, eps):
    work = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 2), dtype=work)


@torch.library.custom_op(
    "cogmerge::add_film_norm_backward",
    mutates_args=(),
    schema="(Tensor dh, Tensor dy, Tensor x, Tensor a, Tensor? gamma, Tensor? weight, Tensor h, Tensor stats,"
    " bool centered, bool bias) -> (Tensor ds, Tensor dgamma, Tensor dbeta, Tensor dweight, Tensor dbias)",
)
def _backward_op(dh, dy, x, a, gamma, weight, h, stats, centered, bias):
    """Gradients of ``x + a``, gamma, beta, weight and bias; those of absent arguments are empty."""
    dh, dy, x, a, gamma, weight, h = _contiguous(dh, dy, x, a, gamma, weight, h)
    if _refusal(x) is not None:
        ds, sums = _backward_torch(dh, dy, x, a, gamma, weight, h, stats, centered)
    else:
        ds, sums = _backward_triton(dh, dy, x, a, gamma, weight, h, stats, centered)
    film = gamma is not None
    # Results of a custom op may share memory neither with each other nor with its arguments.
    wanted = zip(sums, (film, film, weight is not None, bias), strict=True)
    return ds, *(part.clone(memory_format=CONTIGUOUS) if want else empty(stats) for part, want in wanted)


def _backward_torch(dh, dy, x, a, gamma, weight, h, stats, centered):
    work = stats.dtype
    mean, rstd = stats[..., :1], stats[..., 1:]
    n, dy = (h.to(work) - mean) * rstd, dy.to(work)
    dn = dy if weight is None else dy * weight.to(work)
    inner = dn - n * (dn * n).mean(-1, keepdim=True)
    if centered:
        inner = inner - dn.mean(-1, keepdim=True)
    grad = dh.to(work) + rstd * inner
    dgamma, dbeta = (grad * (x.to(work) + a.to(work))).sum(1), grad.sum(1)
    if gamma is not None:
        grad = grad + gamma.to(work)[:, None] * grad
    return grad.to(x.dtype), (dgamma, dbeta, (dy * n).sum((0, 1)), dy.sum((0, 1)))


def _backward_triton(dh, dy, x, a, gamma, weight, h, stats, centered):
    batch, per_sample, width = x.shape
    chunks = cdiv(per_sample, BACKWARD_ROWS)
    ds = torch.empty_like(x)
    partial = stats.new_empty(batch, chunks, 4, width)
    if x.numel():
        BACKWARD_KERNEL[(batch, chunks)](
            dh, dy, x, a, gamma, weight, h, stats, ds, partial, per_sample, width,
            gamma is not None, weight is not None, centered, BACKWARD_ROWS, power_of_two(width),
            num_warps=warps(power_of_two(width)),
        )  # fmt: skip
    per_batch = partial.sum(1)
    dweight, dbias = per_batch[:, 2:].sum(0)
    return ds, (per_batch[:, 0], per_batch[:, 1], dweight, dbias)


@_backward_op.register_fake
def _backward_fake(dh, dy, x, a, gamma, weight, h, stats, centered, bias):
    batch, _, width = x.shape
    per_batch = (batch, width) if gamma is not None else (0,)
    return (
        x.new_empty(x.shape),
        stats.new_empty(per_batch),
        stats.new_empty(per_batch),
        stats.new_empty((width,) if weight is not None else (0,)),
        stats.new_empty((width,) if bias else (0,)),
    )


def _setup_context(ctx, inputs, output):
    x, a, gamma, beta, weight, bias, ctx.centered, _ = inputs
    h, _, stats = output
    ctx.save_for_backward(x, a, gamma, weight, h, stats)
    ctx.dtypes = [None if p is None else p.dtype for p in (gamma, beta, weight, bias)]
    ctx.mark_non_differentiable(stats)


def _backward(ctx, dh, dy, _):
    bias = ctx.dtypes[3] is not None
    ds, *sums = torch.ops.cogmerge.add_film_norm_backward(dh, dy, *ctx.saved_tensors, ctx.centered, bias)
    parameters = [None if d is None else g.to(d) for g, d in zip(sums, ctx.dtypes, strict=True)]
    return ds, ds.to(ctx.saved_tensors[1].dtype), *parameters, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def dispatch(x: Tensor, path: str | None = None) -> Choice:
    """The path that `add_film_norm` takes for `x`, and why."""
    return choose("add_film_norm", _refusal(x), path)


def _refusal(x: Tensor) -> str | None:
    if x.shape[-1] > WIDEST:
        return f"a row of {x.shape[-1]} channels exceeds {WIDEST}"
    return triton_refusal(x)


def add_film_norm(
    x: Tensor,
    a: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``h = (1 + gamma) * (x + a) + beta`` and ``y = norm(h) * weight + bias``.

    `x` and `a` (B, N, D); `h` and `y` (B, N, D) have the dtype of `x`: under autocast a layer's output `a` is
    narrower than the stream. `gamma` and `beta` (B, D), both or neither; `weight` and `bias` (D). `norm` is
    "rms" or "layer". Raises `UserError` for other shapes, another norm or a `path` that cannot run.
    """
    _check(x, a, gamma, beta, weight, bias, norm)
    if dispatch(x, path).path == "torch":
        return torch_path(x, a, gamma, beta, weight, bias, norm, eps)
    h, y, _ = torch.ops.cogmerge.add_film_norm(x, a, gamma, beta, weight, bias, norm == "layer", eps)
    return h, y


def _check(x, a, gamma, beta, weight, bias, norm):
    if norm not in NORMS:
        raise UserError(f"add_film_norm: no norm '{norm}'; choose one of {', '.join(NORMS)}.")
    if x.ndim != 3 or a.shape != x.shape:
        raise UserError(
            f"add_film_norm: x {tuple(x.shape)} and a {tuple(a.shape)} must have one shape (B, N, D)."
        )
    if (gamma is None) != (beta is None):
        raise UserError("add_film_norm: gamma and beta come together; pass both or neither.")
    sample, row = (x.shape[0], x.shape[2]), (x.shape[2],)
    parts = (("gamma", gamma, sample), ("beta", beta, sample), ("weight", weight, row), ("bias", bias, row))
    for name, tensor, wanted in parts:
        if tensor is not None and tensor.shape != wanted:
            raise UserError(f"add_film_norm: {name} has shape {tuple(tensor.shape)}, not {wanted}.")

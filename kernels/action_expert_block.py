"""K5: one block of the cross-attention action expert in four launches.

The rows ``x`` of an action chunk read two streams of a language model's layer, through keys and values that
are projected once per observation (MergeVLA; `vla.policy.action_decoders.cross_attention`)::

    s = [q_A k_A', sigma(g) q_T k_T'] / sqrt(d_head)      q_A = W_qA x + b_qA,   q_T = W_qT x + b_qT
    z = x + W_o softmax(s) [v_A; v_T] + b_o
    y = ReLU(W_f LN(z) + b_f)

A chunk has 8 to 50 rows, so a block is as fast as its weights are read; plain torch takes some twenty
launches for it. The Triton path takes four: both queries, attention over both streams, output projection with
residual, LayerNorm with projection and ReLU. Three of them are one kernel, a product of few rows with a
weight whose prologue and epilogue are switched at compile time.

Backward of the custom op, with ``P = softmax(s)``, ``n = LN(z)``, ``z_hat`` the normalised `z` and
``a = P [v_A; v_T]`` (heads left out)::

    dz_hat = w * W_f' (dy * [y > 0]),   dz = rstd (dz_hat - mean(dz_hat) - z_hat mean(dz_hat * z_hat))
    da = W_o' dz,   dP = da [v_A; v_T]',   ds = P * (dP - sum(dP * P)) / sqrt(d_head)
    dq_A = ds_A k_A,   dq_T = sigma ds_T k_T,   dx = dz + W_qA' dq_A + W_qT' dq_T
    dg = sigma (1 - sigma) sum(ds_T * q_T k_T')

The Triton path has run in the interpreter and been compiled for sm_90; it has not been timed on a GPU yet.
Where torch is chosen the policy's block calls its modules (`vla.policy.action_decoders.cross_attention`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.errors import UserError
from vla.kernels.dispatch import Choice, choose, product_refusal, triton_refusal
from vla.kernels.launch import INTERPRETED, TritonKernel, cdiv, in_autocast, power_of_two, unit_stride

if TYPE_CHECKING:
    import triton.language as tl

#: The parameters of a block, in the order in which every function here takes them.
WEIGHTS = (
    "q_action", "q_action_bias", "q_vision", "q_vision_bias", "gate", "out", "out_bias",
    "norm", "norm_bias", "feed", "feed_bias",
)  # fmt: skip
WIDEST = 256  # channels of a head
MOST_ROWS = 64  # of a chunk: its attention is one tile of rows
TILE = 64  # keys of a tile
COLUMNS, DEPTH = 16, 128  # of a tile of a weight: 56 programs at width 896


def reference(
    x: Tensor, k_action: Tensor, v_action: Tensor, k_vision: Tensor, v_vision: Tensor, *weights: Tensor,
    heads: int, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """The formula in fp64, with queries and keys side by side; as in `action_expert_block`."""
    x, k_action, v_action, k_vision, v_vision, *weights = (
        t.double() for t in (x, k_action, v_action, k_vision, v_vision, *weights)
    )
    q_action, b_action, q_vision, b_vision, gate, out, b_out, norm, b_norm, feed, b_feed = weights
    width = x.shape[-1] // heads
    split = (heads, width)
    # [q_A, sigma q_T] against [[k_A, 0], [0, k_T]] is the same logit for every key.
    query = torch.cat(
        [(x @ q_action.T + b_action).unflatten(-1, split), (x @ q_vision.T + b_vision).unflatten(-1, split)
         / (1 + torch.exp(-gate))], -1
    )  # fmt: skip
    key_action, key_vision = k_action.unflatten(-1, split), k_vision.unflatten(-1, split)
    key = torch.cat([F.pad(key_action, (0, width)), F.pad(key_vision, (width, 0))], 1)
    share = torch.einsum("brhc,bnhc->bhrn", query, key).div(width**0.5).exp()
    value = torch.cat([v_action, v_vision], 1).unflatten(-1, split)
    attended = torch.einsum("bhrn,bnhc->brhc", share / share.sum(-1, keepdim=True), value).flatten(2)
    z = x + attended @ out.T + b_out
    z = z - z.mean(-1, keepdim=True)
    z = z / torch.sqrt(z.square().mean(-1, keepdim=True) + eps)
    return ((z * norm + b_norm) @ feed.T + b_feed).clamp(min=0)


def torch_path(
    x: Tensor, k_action: Tensor, v_action: Tensor, k_vision: Tensor, v_vision: Tensor, *weights: Tensor,
    heads: int, eps: float,
) -> Tensor:  # fmt: skip
    """The same with torch; differentiable by autograd."""
    out, b_out, norm, b_norm, feed, b_feed = weights[5:]
    share, _, values = _attention(x, k_action, v_action, k_vision, v_vision, *weights[:5], heads=heads)
    z = x + F.linear(_join(share @ values), out, b_out)
    return F.relu(F.linear(F.layer_norm(z, z.shape[-1:], norm, b_norm, eps), feed, b_feed))


def _attention(
    x, k_action, v_action, k_vision, v_vision, q_action, b_action, q_vision, b_vision, gate, *, heads
):
    """Shares (B, H, R, A + V), ungated vision logits (B, H, R, V) and values (B, H, A + V, d_head)."""
    keys = _split(k_action, heads), _split(k_vision, heads)
    queries = _split(F.linear(x, q_action, b_action), heads), _split(F.linear(x, q_vision, b_vision), heads)
    over_action, over_vision = (q @ k.transpose(-1, -2) for q, k in zip(queries, keys, strict=True))
    logits = torch.cat([over_action, gate.sigmoid() * over_vision], -1) * keys[0].shape[-1] ** -0.5
    values = _split(torch.cat([v_action, v_vision], 1), heads)
    work = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(work).softmax(-1).to(values.dtype), over_vision, values


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _few_rows_kernel(
    x, weight, bias, second_weight, second_bias, residual, norm, norm_bias, out, rows, inputs, outputs, eps,
    PAIR: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``act(norm(x) weight' + bias) + residual``, or two weights at once into two halves of `out`."""
    row = (tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col, depth = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    if PAIR:
        out += tl.program_id(2).to(tl.int64) * rows * outputs
        if tl.program_id(2) == 1:
            weight, bias = second_weight, second_bias
    if NORM:
        mean = tl.zeros([ROWS], tl.float32)
        for start in range(0, inputs, DEPTH):
            k = (start + depth)[None, :]
            value = tl.load(x + row * inputs + k, (row < rows) & (k < inputs), 0.0)
            mean += tl.sum(value.to(tl.float32), axis=1)
        mean = mean[:, None] / inputs
        square = tl.zeros([ROWS], tl.float32)
        for start in range(0, inputs, DEPTH):
            k = (start + depth)[None, :]
            value = tl.load(x + row * inputs + k, (row < rows) & (k < inputs), 0.0).to(tl.float32)
            value = tl.where(k < inputs, value - mean, 0.0)
            square += tl.sum(value * value, axis=1)
        rstd = 1 / tl.sqrt(square[:, None] / inputs + eps)
    summed = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, inputs, DEPTH):
        k = (start + depth)[None, :]
        value = tl.load(x + row * inputs + k, (row < rows) & (k < inputs), 0.0)
        w = tl.load(weight + col[:, None] * inputs + k, (col < outputs)[:, None] & (k < inputs), 0.0)
        if NORM:
            value = (value.to(tl.float32) - mean) * rstd
            value = value * tl.load(norm + k, k < inputs, 0.0).to(tl.float32)
            value += tl.load(norm_bias + k, k < inputs, 0.0).to(tl.float32)
        if WIDEN:  # the interpreter multiplies bf16 bit patterns
            value, w = value.to(tl.float32), w.to(tl.float32)
        summed += tl.dot(value.to(w.dtype), tl.trans(w), input_precision="ieee")
    col = col[None, :]
    summed += tl.load(bias + col, col < outputs, 0.0).to(tl.float32)
    at, real = row * outputs + col, (row < rows) & (col < outputs)
    if RESIDUAL:
        summed += tl.load(residual + at, real, 0.0).to(tl.float32)
    if RELU:
        summed = tl.maximum(summed, 0.0)
    tl.store(out + at, summed.to(out.dtype.element_ty), real)


FEW_ROWS_KERNEL = TritonKernel(_few_rows_kernel)


def _two_streams_kernel(
    q, k_action, v_action, k_vision, v_vision, gate, out,
    ka_b, ka_s, va_b, va_s, kt_b, kt_s, vt_b, vt_s, samples, rows, actions, visions, heads, width, scale,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One head of a sample: one softmax over the action stream and, tempered by the gate, vision."""
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    channel, model = (d < width)[None, :], heads * width
    at = (b * rows + row)[:, None] * model + h * width + d[None, :]
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, WIDTH], tl.float32)
    for stream in tl.static_range(2):
        if stream == 0:
            k, v, count, factor = k_action + b * ka_b, v_action + b * va_b, actions, scale
            k_s, v_s = ka_s, va_s
        else:
            k, v, count = k_vision + b * kt_b, v_vision + b * vt_b, visions
            factor = scale / (1 + tl.exp(-tl.load(gate).to(tl.float32)))
            k_s, v_s = kt_s, vt_s
        query = tl.load(q + stream * samples * rows * model + at, (row < rows)[:, None] & channel, 0.0)
        for start in range(0, count, TILE):
            token = start + tl.arange(0, TILE)
            real = (token < count)[:, None] & channel
            key = tl.load(k + token[:, None] * k_s + h * width + d[None, :], real, 0.0)
            value = tl.load(v + token[:, None] * v_s + h * width + d[None, :], real, 0.0)
            if WIDEN:
                key, value = key.to(tl.float32), value.to(tl.float32)
            logits = tl.dot(query.to(key.dtype), tl.trans(key), input_precision="ieee") * factor
            logits = tl.where((token < count)[None, :], logits, float("-inf"))
            higher = tl.maximum(best, tl.max(logits, axis=1))
            weight, decay = tl.exp(logits - higher[:, None]), tl.exp(best - higher)
            total = total * decay + tl.sum(weight, axis=1)
            summed = summed * decay[:, None]
            summed += tl.dot(weight.to(value.dtype), value, input_precision="ieee")
            best = higher
    result = (summed / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + at, result, mask=(row < rows)[:, None] & channel)


TWO_STREAMS_KERNEL = TritonKernel(_two_streams_kernel)


@torch.library.custom_op(
    "cogmerge::action_expert_block",
    mutates_args=(),
    schema="(Tensor x, Tensor k_action, Tensor v_action, Tensor k_vision, Tensor v_vision, "
    + ", ".join(f"Tensor {name}" for name in WEIGHTS)
    + ", int heads, float eps) -> Tensor",
)
def _op(x, k_action, v_action, k_vision, v_vision, *rest):
    *weights, heads, eps = rest
    if _refusal(x, heads, weights) is not None:
        work = torch.promote_types(x.dtype, torch.float32)
        wide = (t.to(work) for t in (x, k_action, v_action, k_vision, v_vision, *weights))
        return torch_path(*wide, heads=heads, eps=eps).to(x.dtype)
    x, *weights = (t.contiguous() for t in (x, *weights))
    q_action, b_action, q_vision, b_vision, gate, out, b_out, norm, b_norm, feed, b_feed = weights
    # What stays between launches is small and kept in fp32.
    q = x.new_empty(2, *x.shape, dtype=torch.float32)
    _few_rows(x, q_action, b_action, q, pair=(q_vision, b_vision))
    attended, z, y = torch.empty_like(q[0]), torch.empty_like(q[0]), torch.empty_like(x)
    _two_streams(q, (k_action, v_action, k_vision, v_vision), gate, attended, heads)
    _few_rows(attended, out, b_out, z, residual=x)
    _few_rows(z, feed, b_feed, y, norm=(norm, b_norm), eps=eps, relu=True)
    return y


def _few_rows(x, weight, bias, out, pair=None, residual=None, norm=None, eps=0.0, relu=False):
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    tile, depth = max(16, min(64, power_of_two(rows))), max(16, min(DEPTH, power_of_two(inputs)))
    second, norms = pair or (weight, bias), norm or (bias, bias)  # unread where they stand in
    FEW_ROWS_KERNEL[(cdiv(outputs, COLUMNS), cdiv(rows, tile), 2 if pair else 1)](
        x, weight, bias, *second, x if residual is None else residual,
        *norms, out, rows, inputs, outputs, eps,
        pair is not None, norm is not None, residual is not None, relu, INTERPRETED, tile, COLUMNS, depth,
    )  # fmt: skip


def _two_streams(q, streams, gate, out, heads):
    samples, rows, model = out.shape
    streams = [unit_stride(t) for t in streams]
    strides = [stride for t in streams for stride in t.stride()[:2]]
    width, actions, visions = model // heads, streams[0].shape[1], streams[2].shape[1]
    tile = max(16, min(TILE, power_of_two(max(actions, visions))))
    TWO_STREAMS_KERNEL[(heads, samples)](
        q, *streams, gate, out, *strides, samples, rows, actions, visions, heads, width, width**-0.5,
        INTERPRETED, max(16, power_of_two(rows)), tile, max(16, power_of_two(width)),
    )  # fmt: skip


@_op.register_fake
def _fake(x, *rest):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx, dy):
    *saved, y = ctx.saved_tensors
    work = torch.promote_types(y.dtype, torch.float32)
    x, k_action, v_action, k_vision, v_vision, *weights = (t.to(work) for t in saved)
    out, b_out, norm, b_norm, feed, _ = weights[5:]
    streams = (k_action, v_action, k_vision, v_vision)
    share, over_vision, values = _attention(x, *streams, *weights[:5], heads=ctx.heads)
    attended = _join(share @ values)
    z = x + F.linear(attended, out, b_out)
    rstd = (z.var(-1, unbiased=False, keepdim=True) + ctx.eps).rsqrt()
    z_hat = (z - z.mean(-1, keepdim=True)) * rstd
    dy = (dy * (y > 0)).to(work)
    dn = dy @ feed
    dz = _norm_backward(dn * norm, z_hat, rstd)
    dx, dstreams, dqueries = _attention_backward(
        x, streams, weights[:5], share, over_vision, values, _split(dz @ out, ctx.heads), ctx.heads
    )
    dweights = (
        *dqueries, *_linear_backward(dz, attended),
        (dn * z_hat).sum((0, 1)), dn.sum((0, 1)), *_linear_backward(dy, z_hat * norm + b_norm),
    )  # fmt: skip
    gradients = (dz + dx, *dstreams, *dweights)
    return *(g.to(t.dtype) for g, t in zip(gradients, saved, strict=True)), None, None


def _norm_backward(dz_hat, z_hat, rstd):
    shift, slope = dz_hat.mean(-1, keepdim=True), (dz_hat * z_hat).mean(-1, keepdim=True)
    return rstd * (dz_hat - shift - z_hat * slope)


def _linear_backward(dy, x):
    """Gradients of weight and bias of ``y = W x + b``."""
    return dy.flatten(0, 1).T @ x.flatten(0, 1), dy.sum((0, 1))


def _attention_backward(x, streams, weights, share, over_vision, values, da, heads):
    """`da` (B, H, R, d_head) to the gradients of x, of the four streams and of `weights`, the first five."""
    q_action, b_action, q_vision, b_vision, gate = weights
    actions, sigma = streams[0].shape[1], gate.sigmoid()
    dshare = da @ values.transpose(-1, -2)
    ds = share * (dshare - (dshare * share).sum(-1, keepdim=True)) * values.shape[-1] ** -0.5
    ds_action, ds_vision = ds[..., :actions], ds[..., actions:]
    dgate = sigma * (1 - sigma) * (ds_vision * over_vision).sum()
    ds_vision = sigma * ds_vision
    query_action = _split(F.linear(x, q_action, b_action), heads)
    query_vision = _split(F.linear(x, q_vision, b_vision), heads)
    dq_action, dq_vision = (
        _join(ds_action @ _split(streams[0], heads)),
        _join(ds_vision @ _split(streams[2], heads)),
    )
    dvalues = _join(share.transpose(-1, -2) @ da)
    dstreams = (
        _join(ds_action.transpose(-1, -2) @ query_action), dvalues[:, :actions],
        _join(ds_vision.transpose(-1, -2) @ query_vision), dvalues[:, actions:],
    )  # fmt: skip
    dx = dq_action @ q_action + dq_vision @ q_vision
    return dx, dstreams, (*_linear_backward(dq_action, x), *_linear_backward(dq_vision, x), dgate)


_op.register_autograd(_backward, setup_context=_setup_context)


def dispatch(x: Tensor, heads: int, weights: tuple[Tensor, ...] = (), path: str | None = None) -> Choice:
    """The path that `action_expert_block` takes for the rows `x` (B, R, d), and why."""
    unsuited = None
    if len(x) > 1:
        unsuited = f"a batch of {len(x)} fills the GPU with matrix products; Triton serves one observation"
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)):
        unsuited = "training needs what torch keeps for its own backward"
    return choose("action_expert_block", _refusal(x, heads, weights), path, unsuited)


def _refusal(x: Tensor, heads: int, weights) -> str | None:
    if x.shape[1] > MOST_ROWS:
        return f"a chunk of {x.shape[1]} rows exceeds {MOST_ROWS}"
    if x.shape[2] // heads > WIDEST:
        return f"heads of {x.shape[2] // heads} channels exceed {WIDEST}"
    told = [product_refusal(x, weight) for weight in weights if weight.ndim == 2]
    return next(filter(None, told), triton_refusal(x))


def action_expert_block(
    x: Tensor, k_action: Tensor, v_action: Tensor, k_vision: Tensor, v_vision: Tensor, *weights: Tensor,
    heads: int, eps: float = 1e-5, path: str | None = None,
) -> Tensor:  # fmt: skip
    """One block: rows `x` (B, R, d) to rows (B, R, d).

    `k_action` and `v_action` (B, A, d), A at least 1, and `k_vision` and `v_vision` (B, V, d) are the
    projected streams, heads side by side. `weights` are the block's parameters in the order of `WEIGHTS`:
    matrices (d, d), vectors (d), the gate a scalar. Rows, streams and matrices are of one dtype, or under
    autocast, whose dtype they then take. Raises `UserError` for other shapes or a `path` that cannot run.
    """
    _check(x, (k_action, v_action), (k_vision, v_vision), weights, heads)
    weights = tuple(in_autocast(weight)[0] if weight.ndim == 2 else weight for weight in weights)
    arguments = (*in_autocast(x, k_action, v_action, k_vision, v_vision), *weights)
    x = arguments[0]
    if dispatch(x, heads, weights, path).path == "torch":
        return torch_path(*arguments, heads=heads, eps=eps)
    return torch.ops.cogmerge.action_expert_block(*arguments, heads, eps)


def _check(x, action, vision, weights, heads):
    if x.ndim != 3 or heads < 1 or x.shape[-1] % heads:
        raise UserError(
            f"action_expert_block: x {tuple(x.shape)} must be (B, R, d) with d divisible by {heads} heads."
        )
    batch, _, dim = x.shape
    for name, (k, v) in (("action", action), ("vision", vision)):
        if k.shape != v.shape or k.ndim != 3 or (k.shape[0], k.shape[2]) != (batch, dim):
            raise UserError(
                f"action_expert_block: k_{name} {tuple(k.shape)} and v_{name} {tuple(v.shape)} must both be"
                f" ({batch}, N, {dim})."
            )
    if action[0].shape[1] == 0:
        raise UserError("action_expert_block: the action stream is empty; it needs at least one token.")
    if len(weights) != len(WEIGHTS):
        raise UserError(
            f"action_expert_block takes {len(WEIGHTS)} weights ({', '.join(WEIGHTS)}), not {len(weights)}."
        )
    for name, weight in zip(WEIGHTS, weights, strict=True):
        shape = () if name == "gate" else (dim,) if "bias" in name or name == "norm" else (dim, dim)
        if tuple(weight.shape) != shape:
            raise UserError(f"action_expert_block: {name} is {tuple(weight.shape)}; it must be {shape}.")

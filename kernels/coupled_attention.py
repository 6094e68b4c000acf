"""K6: coupled attention (CAtten) without a mask tensor.

Of S tokens the first `prefix` are causal and the rest, the action block, see everything::

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j   over visible j:   valid_j and (j <= i or i >= prefix)

The queries are those of all tokens or of the last Q: a runtime that has computed the instruction before asks
only for what was observed.

The torch path is an exact identity, two calls of `scaled_dot_product_attention`: causal over the prefix, and
unmasked for the action rows over all keys. Without padding neither needs a mask, which is what flash kernels
want; it is the path for training, for the CPU and for batches. The Triton path is one launch for a single
observation: a tile of causal rows reads only the keys before it, the test of visibility is arithmetic.

Backward of the custom op, from the saved log-sum-exp ``l_i`` (the torch path has SDPA's own)::

    P = exp(scale * q k' - l),   dv = P' do,   dS = P * (do v' - sum_d do * out)
    dq = scale * dS k,   dk = scale * dS' q

The Triton path has run in the interpreter and been compiled for sm_90; it has not been timed on a GPU yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vla.errors import UserError
from vla.kernels.attend import attend
from vla.kernels.dispatch import Choice, choose, triton_refusal
from vla.kernels.launch import INTERPRETED, TritonKernel, cdiv, in_autocast, power_of_two, unit_stride

if TYPE_CHECKING:
    import triton.language as tl

WIDEST = 256  # channels of a head
TILE = 64  # query rows and key rows of a tile; `tl.dot` needs at least 16


def reference(
    q: Tensor, k: Tensor, v: Tensor, prefix: int, valid: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The formula in fp64, a dense softmax; arguments and result as in `coupled_attention`."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = logits.masked_fill(~_visible(q, k, prefix, valid), -torch.inf).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def _visible(q: Tensor, k: Tensor, prefix: int, valid: Tensor | None) -> Tensor:
    """The mask as booleans, (B or 1, 1, Q, S)."""
    position = torch.arange(k.shape[2], device=q.device)
    asking = position[k.shape[2] - q.shape[2] :, None]
    visible = ((position[None, :] <= asking) | (asking >= prefix))[None, None]
    return visible if valid is None else visible & valid[:, None, None, :]


def torch_path(
    q: Tensor, k: Tensor, v: Tensor, prefix: int, valid: Tensor | None, scale: float | None
) -> Tensor:
    """Two SDPA calls; differentiable by autograd."""
    causal = max(prefix - k.shape[2] + q.shape[2], 0)  # queries within the prefix
    rows = []
    if causal > 0:
        observed = q[:, :, :causal], k[:, :, :prefix], v[:, :, :prefix]
        plain = valid is None and causal == prefix
        mask = None
        if not plain:
            mask = _visible(*observed[:2], prefix, None if valid is None else valid[:, :prefix])
        rows.append(attend(*observed, mask, scale, causal=plain))
    if causal < q.shape[2]:
        mask = None if valid is None else valid[:, None, None, :]
        rows.append(attend(q[:, :, causal:], k, v, mask, scale))
    return torch.cat(rows, dim=2)


def _attention_kernel(
    q, k, v, valid, out, lse, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    heads, group, queries, length, prefix, width, scale,
    VALID: tl.constexpr, WIDEN: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    first = tl.program_id(0) * TILE
    row, d = first + tl.arange(0, TILE), tl.arange(0, WIDTH)
    before = length - queries  # keys that stand before the first query
    position = row + before
    channel = (d < width)[None, :]
    query = tl.load(
        q + b * q_b + h * q_h + row[:, None] * q_s + d[None, :], (row < queries)[:, None] & channel, 0.0
    )
    if WIDEN:  # the interpreter multiplies bf16 bit patterns
        query = query.to(tl.float32)
    k += b * k_b + (h // group) * k_h
    v += b * v_b + (h // group) * v_h
    best = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    summed = tl.zeros([TILE, WIDTH], tl.float32)
    # A tile of prefix rows alone never looks past itself.
    end = tl.minimum(first + TILE + before, length)
    if end > prefix:
        end = length
    for start in range(0, end, TILE):
        col = start + tl.arange(0, TILE)
        real = (col < length)[:, None] & channel
        key = tl.load(k + col[:, None] * k_s + d[None, :], real, 0.0)
        value = tl.load(v + col[:, None] * v_s + d[None, :], real, 0.0)
        if WIDEN:
            key, value = key.to(tl.float32), value.to(tl.float32)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        seen = (col < length)[None, :] & ((col[None, :] <= position[:, None]) | (position >= prefix)[:, None])
        if VALID:
            seen = seen & (tl.load(valid + b * length + col, col < length, 0) != 0)[None, :]
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(best, tl.max(logits, axis=1))
        # A row that has seen no key yet has no maximum to take away.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight, decay = tl.exp(logits - shift[:, None]), tl.exp(best - shift)
        total = total * decay + tl.sum(weight, axis=1)
        summed = summed * decay[:, None]
        summed += tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        best = higher
    at = ((b * queries + row) * heads + h)[:, None] * width + d[None, :]
    result = (summed / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + at, result, mask=(row < queries)[:, None] & channel)
    tl.store(lse + (b * heads + h) * queries + row, best + tl.log(total), mask=row < queries)


ATTENTION_KERNEL = TritonKernel(_attention_kernel)


@torch.library.custom_op(
    "cogmerge::coupled_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? valid, int prefix, float scale)"
    " -> (Tensor out, Tensor lse)",
)
def _op(q, k, v, valid, prefix, scale):
    """`out` (B, H, Q, d), stored token by token as the output projection reads it, and lse (B, H, Q)."""
    if _refusal(q) is not None:
        return _forward_torch(q, k, v, valid, prefix, scale)
    batch, heads, queries, width = q.shape
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    out = _token_major(q)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    tile = max(16, min(TILE, power_of_two(queries)))
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    ATTENTION_KERNEL[(cdiv(queries, tile), batch * heads)](
        q, k, v, None if valid is None else valid.contiguous().view(torch.uint8), out, lse, *strides,
        heads, heads // k.shape[1], queries, k.shape[2], prefix, width, scale,
        valid is not None, INTERPRETED, tile, max(16, power_of_two(width)),
    )  # fmt: skip
    return out, lse


def _token_major(q: Tensor) -> Tensor:
    """Empty (B, H, Q, d) whose memory is (B, Q, H, d): joining the heads afterwards copies nothing."""
    batch, heads, length, width = q.shape
    return q.new_empty(batch, length, heads, width).transpose(1, 2)


def _logits(q, k, valid, prefix, scale):
    """Masked logits in at least fp32, with the heads of a group side by side: (B, G, H/G, Q, S)."""
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(work).unflatten(1, (k.shape[1], -1))
    logits = grouped @ k.to(work).transpose(-1, -2)[:, :, None] * scale
    return logits.masked_fill(~_visible(q, k, prefix, valid)[:, :, None], -torch.inf)


def _forward_torch(q, k, v, valid, prefix, scale):
    logits = _logits(q, k, valid, prefix, scale)
    lse = logits.logsumexp(-1)
    out = (logits - lse[..., None]).exp() @ v.to(logits.dtype)[:, :, None]
    return _token_major(q).copy_(out.flatten(1, 2)), lse.flatten(1, 2)


@_op.register_fake
def _fake(q, k, v, valid, prefix, scale):
    work = torch.promote_types(q.dtype, torch.float32)
    return _token_major(q), q.new_empty(q.shape[:3], dtype=work)


def _setup_context(ctx, inputs, output):
    q, k, v, valid, ctx.prefix, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, valid, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, _):
    q, k, v, valid, out, lse = ctx.saved_tensors
    work, groups = lse.dtype, (k.shape[1], -1)
    weights = (_logits(q, k, valid, ctx.prefix, ctx.scale) - lse.unflatten(1, groups)[..., None]).exp()
    dout, out = (x.to(work).unflatten(1, groups) for x in (dout, out))
    dv = (weights.transpose(-1, -2) @ dout).sum(2)
    dweights = dout @ v.to(work).transpose(-1, -2)[:, :, None]
    dlogits = weights * (dweights - (dout * out).sum(-1, keepdim=True)) * ctx.scale
    dq = (dlogits @ k.to(work)[:, :, None]).flatten(1, 2)
    dk = (dlogits.transpose(-1, -2) @ q.to(work).unflatten(1, groups)).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def dispatch(q: Tensor, path: str | None = None) -> Choice:
    """The path that `coupled_attention` takes for the queries `q`, and why."""
    unsuited = None
    if len(q) > 1:
        unsuited = f"a batch of {len(q)} fills the GPU with SDPA; Triton serves one observation at a time"
    elif q.requires_grad and torch.is_grad_enabled():
        unsuited = "SDPA has the faster backward"
    return choose("coupled_attention", _refusal(q), path, unsuited)


def _refusal(q: Tensor) -> str | None:
    if q.shape[3] > WIDEST:
        return f"heads of {q.shape[3]} channels exceed {WIDEST}"
    return triton_refusal(q)


def coupled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: int,
    valid: Tensor | None = None,
    scale: float | None = None,
    path: str | None = None,
) -> Tensor:
    """Attend with the first `prefix` of S tokens causal and the rest seeing all: (B, H, Q, d).

    `q` (B, H, Q, d) are the queries of the last Q tokens, of all where Q = S; `k` and `v` (B, G, S, d) with G
    dividing H; all of one dtype, or under autocast, whose dtype they then take; `valid` (B, S) booleans marks
    the real keys, the first of which must be token 0 (not checked: that would read device data); `scale`
    defaults to d^-1/2. Raises `UserError` for other shapes or a `path` that cannot run.
    """
    _check(q, k, v, prefix, valid)
    if dispatch(q, path).path == "torch":
        return torch_path(q, k, v, prefix, valid, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = in_autocast(q, k, v)
    return torch.ops.cogmerge.coupled_attention(q, k, v, valid, prefix, scale)[0]


def _check(q, k, v, prefix, valid):
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise UserError(f"coupled_attention: {shapes} must be (B, H, Q, d) and twice (B, G, S, d).")
    batch, length = k.shape[0], k.shape[2]
    if (len(q), q.shape[3]) != (batch, k.shape[3]) or q.shape[2] > length or q.shape[1] % k.shape[1]:
        raise UserError(
            f"coupled_attention: {shapes} must share B and d, with no more queries than keys, and the heads "
            "of k must divide those of q."
        )
    if not 0 <= prefix <= length:
        raise UserError(f"coupled_attention: a prefix of {prefix} does not fit into {length} tokens.")
    if valid is not None and (tuple(valid.shape) != (batch, length) or valid.dtype != torch.bool):
        raise UserError(
            f"coupled_attention: valid is {valid.dtype} {tuple(valid.shape)}; it must be booleans "
            f"{(batch, length)}."
        )

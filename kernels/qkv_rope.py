"""K4, second part: the three projections of an attention layer, rotated and split into heads, in one launch.

For rows ``x`` of few observations, weights (heads * d, D) as Llama and Qwen have them, with or without bias,
and RoPE tables per token; ``[a, b]`` are the two halves of a head's channels::

    [a, b] = x W' + bias                                        every head of q, k and v
    q, k:  [a, b] <- [a cos_1 - b sin_1,  b cos_2 + a sin_2]    rotary position (arXiv 2104.09864)

A program holds the two halves of one head as two sums, so that it rotates what it has just computed; torch
takes three products and some ten pointwise launches. Backward, with ``da, db`` the gradients of the halves
before rotation and ``p`` what a projection gives::

    da = dout_1 cos_1 + dout_2 sin_2,   db = dout_2 cos_2 - dout_1 sin_1
    dx = sum dp W,   dW = dp' x,   dbias = sum dp

The Triton path has run in the interpreter and been compiled for sm_90; it has not been timed on a GPU yet.
Where torch is chosen the policy calls transformers' attention as it is (`vla.policy.layer_parts`).
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

WIDEST = 256  # channels of a head
ROWS, DEPTH = 128, 64  # of a tile, at most


def reference(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in fp64, pairs of channels as complex numbers; as in `qkv_rope`."""
    width, half = cos.shape[-1], cos.shape[-1] // 2
    heads = []
    for weight, bias in zip((q, k, v), biases or (None,) * 3, strict=True):
        rows = torch.einsum("bnc,fc->bnf", x.double(), weight.double())
        rows = rows if bias is None else rows + bias.double()
        heads.append(rows.unflatten(-1, (-1, width)).permute(0, 2, 1, 3))
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    turned = []
    for head in heads[:2]:
        a, b = head[..., :half], head[..., half:]
        first = (torch.complex(a, b) * torch.complex(cos[..., :half], sin[..., :half])).real
        second = (torch.complex(a, b) * torch.complex(cos[..., half:], sin[..., half:])).imag
        turned.append(torch.cat([first, second], -1))
    return turned[0], turned[1], heads[2]


def torch_path(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    biases: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with torch, as transformers has it; differentiable by autograd."""
    biases = biases or (None, None, None)
    q, k, v = (_split(F.linear(x, w, b), cos) for w, b in zip((q, k, v), biases, strict=True))
    cos, sin = cos[:, None], sin[:, None]
    return q * cos + _quarter_turn(q) * sin, k * cos + _quarter_turn(k) * sin, v


def _split(rows: Tensor, cos: Tensor) -> Tensor:
    """(B, N, heads * d) to (B, heads, N, d)."""
    return rows.unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2)


def _quarter_turn(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def _qkv_kernel(
    x, q, k, v, q_bias, k_bias, v_bias, cos, sin, q_out, k_out, v_out,
    heads, groups, rows, per_sample, inputs, half, table_sample,
    BIAS: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    head, many, weight, bias, out = tl.program_id(0), heads, q, q_bias, q_out
    turns = head < heads + groups
    if head >= heads + groups:
        head, many, weight, bias, out = head - heads - groups, groups, v, v_bias, v_out
    elif head >= heads:
        head, many, weight, bias, out = head - heads, groups, k, k_bias, k_out
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, HALF)
    first = head.to(tl.int64) * 2 * half + c  # rows of the weight: a head's first half; the second follows
    a = tl.zeros([ROWS, HALF], tl.float32)
    b = tl.zeros([ROWS, HALF], tl.float32)
    for start in range(0, inputs, DEPTH):
        depth = (start + tl.arange(0, DEPTH))[None, :]
        value = tl.load(x + row[:, None] * inputs + depth, (row < rows)[:, None] & (depth < inputs), 0.0)
        at, inside = first[:, None] * inputs + depth, (c < half)[:, None] & (depth < inputs)
        w1, w2 = tl.load(weight + at, inside, 0.0), tl.load(weight + at + half * inputs, inside, 0.0)
        if WIDEN:  # the interpreter multiplies bf16 bit patterns
            value, w1, w2 = value.to(tl.float32), w1.to(tl.float32), w2.to(tl.float32)
        a += tl.dot(value, tl.trans(w1), input_precision="ieee")
        b += tl.dot(value, tl.trans(w2), input_precision="ieee")
    if BIAS:
        a += tl.load(bias + first, c < half, 0.0).to(tl.float32)[None, :]
        b += tl.load(bias + first + half, c < half, 0.0).to(tl.float32)[None, :]
    sample, token = row // per_sample, row % per_sample
    real = (row < rows)[:, None] & (c < half)[None, :]
    if turns:
        table = (sample * table_sample + token * 2 * half)[:, None] + c[None, :]
        cos1 = tl.load(cos + table, real, 0.0).to(tl.float32)
        sin1 = tl.load(sin + table, real, 0.0).to(tl.float32)
        cos2 = tl.load(cos + table + half, real, 0.0).to(tl.float32)
        sin2 = tl.load(sin + table + half, real, 0.0).to(tl.float32)
        a, b = a * cos1 - b * sin1, b * cos2 + a * sin2
    into = ((sample * many + head) * per_sample + token)[:, None] * 2 * half + c[None, :]
    tl.store(out + into, a.to(out.dtype.element_ty), real)
    tl.store(out + into + half, b.to(out.dtype.element_ty), real)


QKV_KERNEL = TritonKernel(_qkv_kernel)


@torch.library.custom_op(
    "cogmerge::qkv_rope",
    mutates_args=(),
    schema="(Tensor x, Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? q_bias, Tensor? k_bias, "
    "Tensor? v_bias) -> (Tensor q_out, Tensor k_out, Tensor v_out)",
)
def _op(x, q, k, v, cos, sin, q_bias, k_bias, v_bias):
    biases = None if q_bias is None else (q_bias, k_bias, v_bias)
    if _refusal(x, q, cos) is not None:
        results = torch_path(*(t.to(_work(x)) for t in (x, q, k, v, cos, sin)), _widened(x, biases))
        return tuple(t.to(x.dtype, memory_format=torch.contiguous_format, copy=True) for t in results)
    x, q, k, v, cos, sin = (t.contiguous() for t in (x, q, k, v, cos, sin))
    q_out, k_out, v_out = _fake(x, q, k, v, cos, sin, q_bias, k_bias, v_bias)
    (batch, tokens, inputs), width, rows = x.shape, cos.shape[-1], x.shape[0] * x.shape[1]
    heads, groups = len(q) // width, len(k) // width
    tile, depth = max(16, min(ROWS, power_of_two(rows))), max(16, min(DEPTH, power_of_two(inputs)))
    if rows:
        QKV_KERNEL[(heads + 2 * groups, cdiv(rows, tile))](
            x, q, k, v, q_bias, k_bias, v_bias, cos, sin, q_out, k_out, v_out,
            heads, groups, rows, tokens, inputs, width // 2, tokens * width if len(cos) == batch else 0,
            biases is not None, INTERPRETED, tile, max(16, power_of_two(width // 2)), depth,
            num_warps=8 if tile == ROWS else 4,
        )  # fmt: skip
    return q_out, k_out, v_out


def _work(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _widened(x, biases):
    return None if biases is None else tuple(b.to(_work(x)) for b in biases)


@_op.register_fake
def _fake(x, q, k, v, cos, sin, q_bias, k_bias, v_bias):
    batch, tokens, width = *x.shape[:2], cos.shape[-1]
    return tuple(x.new_empty(batch, w.shape[0] // width, tokens, width) for w in (q, k, v))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.biased = inputs[6] is not None


def _backward(ctx, dq, dk, dv):
    x, *weights, cos, sin = ctx.saved_tensors
    work = _work(x)
    cos, sin, rows = cos.to(work)[:, None], sin.to(work)[:, None], x.to(work).flatten(0, 1)
    dq, dk = (_turn_back(d.to(work), cos, sin) for d in (dq, dk))
    dx, dweights, dbiases = torch.zeros_like(rows), [], []
    for weight, gradient in zip(weights, (dq, dk, dv.to(work)), strict=True):
        gradient = gradient.transpose(1, 2).flatten(2).flatten(0, 1)
        dx = dx + gradient @ weight.to(work)
        dweights.append((gradient.T @ rows).to(weight.dtype))
        dbiases.append(gradient.sum(0).to(weight.dtype) if ctx.biased else None)
    return dx.reshape(x.shape).to(x.dtype), *dweights, None, None, *dbiases


def _turn_back(gradient: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = (gradient * sin).chunk(2, dim=-1)
    return gradient * cos + torch.cat([second, -first], dim=-1)


_op.register_autograd(_backward, setup_context=_setup_context)


def dispatch(x: Tensor, q: Tensor, cos: Tensor, path: str | None = None) -> Choice:
    """The path that `qkv_rope` takes for rows `x`, the weight `q` and the table `cos`, and why."""
    unsuited = product_unsuited(x.shape[0] * x.shape[1], x, q)
    return choose("qkv_rope", _refusal(x, q, cos), path, unsuited)


def _refusal(x: Tensor, q: Tensor, cos: Tensor) -> str | None:
    if cos.shape[-1] > WIDEST:
        return f"heads of {cos.shape[-1]} channels exceed {WIDEST}"
    return product_refusal(x, q)


def qkv_rope(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
    path: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Project `x` (B, N, D) to rotated queries (B, H, N, d) and keys and to values, each (B, G, N, d).

    Weights `q` (H * d, D), `k` and `v` (G * d, D) of x's dtype, with `biases` of the three or none; RoPE
    tables `cos` and `sin` (B or 1, N, d), d even. Gradients reach x, weights and biases, not the tables.
    Raises `UserError` for other shapes or a `path` that cannot run.
    """
    _check(x, q, k, v, cos, sin, biases)
    x, q, k, v = in_autocast(x, q, k, v)
    if dispatch(x, q, cos, path).path == "torch":
        return torch_path(x, q, k, v, cos.to(x.dtype), sin.to(x.dtype), biases)
    return torch.ops.cogmerge.qkv_rope(x, q, k, v, cos, sin, *(biases or (None, None, None)))


def _check(x, q, k, v, cos, sin, biases):
    if x.ndim != 3 or any(w.ndim != 2 or w.shape[1] != x.shape[2] for w in (q, k, v)) or k.shape != v.shape:
        raise UserError(
            f"qkv_rope: x {tuple(x.shape)}, q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} "
            "must be (B, N, D), (H * d, D) and twice (G * d, D)."
        )
    if cos.ndim != 3 or cos.shape != sin.shape or cos.shape[1] != x.shape[1] or len(cos) not in (1, len(x)):
        raise UserError(
            f"qkv_rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be (B or 1, N, d) for x "
            f"{tuple(x.shape)}."
        )
    width = cos.shape[-1]
    if width % 2 or len(q) % width or len(k) % width:
        raise UserError(f"qkv_rope: {len(q)} and {len(k)} channels are not whole heads of {width}, even.")
    if biases is not None and [tuple(b.shape) for b in biases] != [(len(w),) for w in (q, k, v)]:
        raise UserError("qkv_rope: biases must be three, one entry per row of q, k and v.")

"""K2: the LFP router folded into one pass over the tokens, and an exact, deterministic top-k.

Of a sequence, the tokens in ``first <= i < end`` are candidates and the others are kept in any case.

The router scores a normalised token by ``s = w . ((1 + gamma) * RMS(x) * g + beta) + b``. Everything but
``x`` is constant over a sample's tokens, so `fold_router` gathers it once::

    direction = w * g * (1 + gamma),   offset = w . beta + b                     (B, D) and (B,)
    s_i = rstd_i * (x_i . direction) + offset,   rstd_i = (mean x_i^2 + eps)^-1/2
    index = the k candidates of highest s, and all others, ascending
    gate = gate_scale * sigmoid(s[index]),  1 for the others

No modulated (B, V, D) tensor and no sort: a token's rank is the count of higher scores, equal scores going to
the lower index, so a replay selects the same tokens bit for bit. A NaN ranks highest, to show in the output.

Backward runs through the gates of the kept candidates alone; ``t = dgate * gate * (1 - gate / gate_scale)``::

    n = x * rstd,   ddirection = sum_i t_i n_i,   doffset = sum_i t_i
    dx_i = rstd_i * t_i * (direction - n_i * mean(direction * n_i))              kept tokens, else 0

The Triton path is two launches: scores on all processors, then one program per sample for the ranks. It has
run in the interpreter and been compiled for sm_90; it has not been timed on a GPU yet.
Where torch is chosen the policy calls the router's modules instead: folding rounds differently, so that the
torch path here would change the actions of trained checkpoints in their last bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vla.errors import UserError
from vla.kernels.dispatch import Choice, choose, triton_refusal
from vla.kernels.launch import TritonKernel, cdiv, power_of_two, unit_stride, warps

if TYPE_CHECKING:
    import triton.language as tl

WIDEST = 16384  # channels: one row must fit the registers of one program
MOST_TOKENS = 1024  # one program ranks them all
TILE = 4096  # elements a scoring program works on
RIVALS = 32  # scores that every token is compared with at a time


def fold_router(
    score_weight: Tensor, score_bias: Tensor, norm_weight: Tensor, gamma: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Fold score (D) and (1), RMSNorm weight (D) and FiLM (B, D) into direction (B, D) and offset (B).

    Plain torch in at least fp32, so gradients reach every part. Constant as long as gamma and beta are: a
    runtime that caches the instruction folds once.
    """
    work = torch.promote_types(score_weight.dtype, torch.float32)
    weight, gamma, beta = score_weight.to(work), gamma.to(work), beta.to(work)
    direction = weight * norm_weight.to(work) * (1 + gamma)
    return direction, (beta * weight).sum(-1) + score_bias.to(work)  # no product that autocast would narrow


def reference(
    x: Tensor,
    direction: Tensor,
    offset: Tensor,
    k: int,
    gate_scale: float = 1.0,
    eps: float = 1e-6,
    span: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in fp64, ranks by counting; arguments and results as in `film_route_select`."""
    x = x.double()
    rstd = 1 / (x.square().mean(-1) + eps).sqrt()
    score = rstd * (x * direction.double()[:, None]).sum(-1) + offset.double()[:, None]
    mine, other = score[:, :, None], score[:, None, :]
    position = torch.arange(x.shape[1], device=x.device)
    equal = (other == mine) | (other.isnan() & mine.isnan())
    higher = (other > mine) | (other.isnan() & ~mine.isnan())
    first, end = span or (0, x.shape[1])
    candidate = (position >= first) & (position < end)
    ahead = (higher | (equal & (position[None, :] < position[:, None]))) & candidate[None, None, :]
    keep = (ahead.sum(-1) < k) | ~candidate
    index = keep.nonzero()[:, 1].reshape(len(x), -1)
    gate = torch.where(candidate, gate_scale * score.sigmoid(), torch.ones_like(score))
    return index, gate.gather(1, index), rstd


def torch_path(
    x: Tensor,
    direction: Tensor,
    offset: Tensor,
    k: int,
    gate_scale: float,
    eps: float,
    first: int,
    end: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with torch's stable sort, in at least fp32; differentiable by autograd."""
    work = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(work)
    rstd = (wide.square().mean(-1) + eps).rsqrt()
    score = rstd * (wide @ direction.to(work)[..., None]).squeeze(-1) + offset.to(work)[:, None]
    score = score[:, first:end]
    order = torch.sort(score.detach(), dim=-1, descending=True, stable=True).indices
    kept = order[:, :k].sort(dim=-1).values
    gate = gate_scale * score.gather(1, kept).sigmoid()
    position = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    index = torch.cat([position[:, :first], kept + first, position[:, end:]], dim=1)
    before, after = gate.new_ones(len(x), first), gate.new_ones(len(x), x.shape[1] - end)
    return index, torch.cat([before, gate, after], dim=1), rstd.detach()


def _score_kernel(
    x, direction, offset, score, rstd, x_sample, x_token, tokens, width, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < tokens)[:, None] & (col < width)[None, :]
    at = sample * x_sample + row.to(tl.int64)[:, None] * x_token + col[None, :]
    token = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    along = tl.load(direction + sample * width + col, mask=col < width, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(token * token, axis=1) / width + eps)
    dot = tl.sum(token * along[None, :], axis=1)
    shift = tl.load(offset + sample).to(tl.float32)
    out = sample * tokens + row
    tl.store(rstd + out, inverse, mask=row < tokens)
    tl.store(score + out, inverse * dot + shift, mask=row < tokens)


def _select_kernel(
    score, index, gate, tokens, first, end, k, gate_scale, TOKENS: tl.constexpr, RIVALS: tl.constexpr
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, TOKENS)
    mine = tl.load(score + sample * tokens + token, mask=token < tokens, other=0.0)
    # Bits of a float, with the negative half turned over, order like the float: NaN fits in at the top.
    bits = tl.where(mine == 0.0, 0.0, mine).to(tl.int32, bitcast=True)
    key = tl.where(mine != mine, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    rank = tl.zeros([TOKENS], tl.int32)
    for start in range(first, end, RIVALS):
        rival = start + tl.arange(0, RIVALS)
        theirs = tl.load(score + sample * tokens + rival, mask=rival < end, other=0.0)
        their_bits = tl.where(theirs == 0.0, 0.0, theirs).to(tl.int32, bitcast=True)
        their_key = tl.where(their_bits < 0, their_bits ^ 0x7FFFFFFF, their_bits)
        their_key = tl.where(theirs != theirs, 0x7FFFFFFF, their_key)
        ahead = (their_key[None, :] > key[:, None]) | (
            (their_key[None, :] == key[:, None]) & (rival[None, :] < token[:, None])
        )
        rank += tl.sum((ahead & (rival < end)[None, :]).to(tl.int32), axis=1)
    candidate = (token >= first) & (token < end)
    keep = ((rank < k) | (candidate == 0)) & (token < tokens)
    slot = sample * (tokens - end + first + k) + tl.cumsum(keep.to(tl.int32), axis=0) - 1
    tl.store(index + slot, token.to(tl.int64), mask=keep)
    tl.store(gate + slot, tl.where(candidate, gate_scale / (1.0 + tl.exp(-mine)), 1.0), mask=keep)


SCORE_KERNEL, SELECT_KERNEL = TritonKernel(_score_kernel), TritonKernel(_select_kernel)


@torch.library.custom_op(
    "cogmerge::film_route_select",
    mutates_args=(),
    schema="(Tensor x, Tensor direction, Tensor offset, int k, float gate_scale, float eps, int first, "
    "int end) -> (Tensor index, Tensor gate, Tensor rstd)",
)
def _op(x, direction, offset, k, gate_scale, eps, first, end):
    if _refusal(x) is not None:
        return torch_path(x, direction, offset, k, gate_scale, eps, first, end)
    batch, tokens, width = x.shape
    x = unit_stride(x)
    direction, offset = direction.contiguous(), offset.contiguous()
    score, rstd = torch.empty(2, batch, tokens, dtype=torch.float32, device=x.device)
    kept = tokens - end + first + k
    index = torch.empty(batch, kept, dtype=torch.int64, device=x.device)
    gate = torch.empty(batch, kept, dtype=torch.float32, device=x.device)
    block = power_of_two(width)
    rows = max(1, min(TILE // block, power_of_two(tokens)))
    SCORE_KERNEL[(batch, cdiv(tokens, rows))](
        x, direction, offset, score, rstd, x.stride(0), x.stride(1), tokens, width, eps, rows, block,
        num_warps=warps(rows * block),
    )  # fmt: skip
    block = power_of_two(tokens)
    SELECT_KERNEL[(batch,)](
        score, index, gate, tokens, first, end, k, gate_scale, block, RIVALS, num_warps=warps(block * RIVALS)
    )
    return index, gate, rstd


@_op.register_fake
def _fake(x, direction, offset, k, gate_scale, eps, first, end):
    work = torch.promote_types(x.dtype, torch.float32)
    batch, tokens, _ = x.shape
    kept = tokens - end + first + k
    return (
        x.new_empty((batch, kept), dtype=torch.int64),
        x.new_empty((batch, kept), dtype=work),
        x.new_empty((batch, tokens), dtype=work),
    )


def _setup_context(ctx, inputs, output):
    x, direction, offset, _, ctx.gate_scale, _, *ctx.span = inputs
    ctx.save_for_backward(x, direction, *output)
    ctx.offset_dtype = offset.dtype
    ctx.mark_non_differentiable(output[0], output[2])


def _backward(ctx, _, dgate, __):
    x, direction, index, gate, rstd = ctx.saved_tensors
    first, end = ctx.span
    candidate = (index >= first) & (index < end)
    t = (dgate * gate * (1 - gate / ctx.gate_scale) * candidate)[..., None]
    columns = index[..., None].expand(-1, -1, x.shape[-1])
    rstd = rstd.gather(1, index)[..., None]
    n = x.gather(1, columns).to(gate.dtype) * rstd
    along = direction.to(gate.dtype)[:, None]
    kept = rstd * t * (along - n * (along * n).mean(-1, keepdim=True))
    dx = torch.zeros_like(x).scatter(1, columns, kept.to(x.dtype))
    ddirection, doffset = (t * n).sum(1), t.sum((1, 2))
    return dx, ddirection.to(direction.dtype), doffset.to(ctx.offset_dtype), None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def dispatch(x: Tensor, path: str | None = None) -> Choice:
    """The path that `film_route_select` takes for `x`, and why."""
    return choose("film_route_select", _refusal(x), path)


def _refusal(x: Tensor) -> str | None:
    if x.shape[1] > MOST_TOKENS:
        return f"{x.shape[1]} tokens exceed the {MOST_TOKENS} that one program ranks"
    if x.shape[2] > WIDEST:
        return f"a row of {x.shape[2]} channels exceeds {WIDEST}"
    return triton_refusal(x)


def film_route_select(
    x: Tensor,
    direction: Tensor,
    offset: Tensor,
    k: int,
    gate_scale: float = 1.0,
    eps: float = 1e-6,
    span: tuple[int, int] | None = None,
    path: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rank tokens of `x` (B, S, D) by the folded router and keep `k` of them: ``(index, gate, rstd)``.

    The candidates are the tokens ``span[0] <= i < span[1]``, or all; the others are kept besides, so that
    ``n = S - (end - first) + k`` are. `direction` (B, D) and `offset` (B) come from `fold_router`; `eps` is
    that of the layer's RMSNorm. `index` (B, n) int64 ascends; `gate` (B, n) is ``gate_scale *
    sigmoid(score)`` of the kept candidates and 1 of the others; `rstd` (B, S) is what `select_gather_norm`
    reuses. Gates and rstd are fp32 (fp64 for fp64 tokens); gradients flow from the gates to all three
    tensors. Raises `UserError` for other shapes or a `path` that cannot run.
    """
    if x.ndim != 3 or direction.shape != (x.shape[0], x.shape[2]) or offset.shape != x.shape[:1]:
        raise UserError(
            f"film_route_select: x {tuple(x.shape)}, direction {tuple(direction.shape)} and offset "
            f"{tuple(offset.shape)} must be (B, S, D), (B, D) and (B,)."
        )
    first, end = (0, x.shape[1]) if span is None else span
    if not 0 <= first < end <= x.shape[1]:
        raise UserError(f"film_route_select: candidates {first} to {end} do not lie in {x.shape[1]} tokens.")
    if not 1 <= k <= end - first:
        raise UserError(f"film_route_select: cannot keep {k} of {end - first} tokens; k is 1 up to all.")
    if dispatch(x, path).path == "torch":
        return torch_path(x, direction, offset, k, gate_scale, eps, first, end)
    return torch.ops.cogmerge.film_route_select(x, direction, offset, k, gate_scale, eps, first, end)

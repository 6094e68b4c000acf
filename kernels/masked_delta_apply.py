"""K7: write a task's weights into the live buffers, from one-bit masks.

``W_t = W_0 + scale * S_t * tau``: base weights, the merged task vector and the task's mask (TALL-masks,
MergeVLA section 3). Where the mask is 0 the base weight stands, bit for bit, whatever `tau` holds there.
Entry ``i`` of the flattened tensor is bit ``i % 8`` of byte ``i // 8``, lowest bit first, the layout in which
experts are stored; the mask is never unpacked in memory by the Triton path. The result goes into `out`, which
a captured graph goes on reading: switching the task needs no new capture and costs nothing afterwards.

No backward: masks switch finished experts. The Triton path has run in the interpreter and been compiled for
sm_90; it has not been timed on a GPU yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vla.errors import UserError
from vla.kernels.dispatch import Choice, choose, triton_refusal
from vla.kernels.launch import TritonKernel, cdiv

if TYPE_CHECKING:
    import triton.language as tl

BYTES = 256  # mask bytes, that is 2048 weights, of one program
BLOCK = 1 << 16  # weights of one step of the torch path on a CPU
#: All bits of lane `i` of row `byte` are bit `i` of that byte.
_LANES = -((torch.arange(256, dtype=torch.int32)[:, None] >> torch.arange(8, dtype=torch.int32)) & 1)


def reference(base: Tensor, delta: Tensor, packed: Tensor, scale: float = 1.0) -> Tensor:
    """The formula in fp64, bit by bit; the weights as a new tensor."""
    weights = base.double().flatten().clone()
    flat = delta.double().flatten()
    bits = packed.tolist()
    for i in range(weights.numel()):
        if bits[i // 8] & (1 << i % 8):
            weights[i] += scale * flat[i]
    return weights.view(base.shape)


def torch_path(out: Tensor, base: Tensor, delta: Tensor, packed: Tensor, scale: float) -> None:
    """The same with torch; on a CPU in blocks that stay in its cache.

    What stands is chosen bit by bit, ``w ^ ((w ^ w') & m)``: `torch.where` jumps at every entry, and on masks
    that look random takes longer than all of this together.
    """
    work = torch.promote_types(base.dtype, torch.float32)
    bits = torch.int64 if work == torch.float64 else torch.int32
    lanes = _LANES.to(packed.device, bits)
    result = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    block = BLOCK if out.device.type == "cpu" else max(8, cdiv(out.numel(), 8) * 8)
    parts = (t.reshape(-1).split(block) for t in (result, base, delta))
    for into, before, tau, mask in zip(*parts, packed.split(block // 8), strict=True):
        before = before.to(work)
        after = (tau.to(work) * scale).add_(before)
        used = lanes.index_select(0, mask.int()).view(-1)[: len(before)]
        chosen = after.view(bits).bitwise_xor_(before.view(bits)).bitwise_and_(used)
        into.copy_(chosen.bitwise_xor_(before.view(bits)).view(work))
    if result is not out:
        out.copy_(result)


def _apply_kernel(out, base, delta, packed, count, scale, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    at = byte[:, None] * 8 + bit[None, :]
    inside = at < count
    mask = tl.load(packed + byte, mask=byte * 8 < count, other=0).to(tl.int32)
    keep = ((mask[:, None] >> bit[None, :]) & 1) != 0
    weight = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    # Entries that the mask leaves out are not read: a sparse mask saves their traffic by the sector.
    tau = tl.load(delta + at, mask=inside & keep, other=0.0).to(tl.float32)
    weight = tl.where(keep, weight + scale * tau, weight)
    tl.store(out + at, weight.to(out.dtype.element_ty), mask=inside)


APPLY_KERNEL = TritonKernel(_apply_kernel)


@torch.library.custom_op(
    "cogmerge::masked_delta_apply",
    mutates_args=("out",),
    schema="(Tensor(a!) out, Tensor base, Tensor delta, Tensor packed, float scale) -> ()",
)
def _op(out, base, delta, packed, scale):
    if _refusal(out, base) is not None:
        torch_path(out, base, delta, packed, scale)
        return
    base, delta, packed = base.contiguous(), delta.contiguous(), packed.contiguous()
    count = base.numel()
    if count:
        APPLY_KERNEL[(cdiv(count, 8 * BYTES),)](out, base, delta, packed, count, scale, BYTES)


@_op.register_fake
def _fake(out, base, delta, packed, scale):
    return None


def dispatch(out: Tensor, base: Tensor, path: str | None = None) -> Choice:
    """The path that `masked_delta_apply` takes for these weights, and why."""
    return choose("masked_delta_apply", _refusal(out, base), path)


def _refusal(out: Tensor, base: Tensor) -> str | None:
    if not out.is_contiguous():
        return "the weights written to are not contiguous"
    return triton_refusal(out) or triton_refusal(base)


@torch.no_grad()
def masked_delta_apply(
    out: Tensor,
    base: Tensor,
    delta: Tensor,
    packed: Tensor,
    scale: float = 1.0,
    path: str | None = None,
) -> Tensor:
    """Write ``base + scale * mask * delta`` into `out` and return it.

    `out`, `base` and `delta` have one shape and may differ in dtype; the sum is taken in fp32 (fp64 for fp64
    weights) and rounded once. `out` may be a live parameter, or `base` itself. `packed` (ceil(numel / 8))
    uint8 is the mask, one bit per weight. Raises `UserError` for other shapes or a `path` that cannot run.
    """
    if not out.shape == base.shape == delta.shape:
        raise UserError(
            f"masked_delta_apply: out {tuple(out.shape)}, base {tuple(base.shape)} and delta "
            f"{tuple(delta.shape)} must have one shape."
        )
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (cdiv(base.numel(), 8),):
        raise UserError(
            f"masked_delta_apply: {packed.dtype} {tuple(packed.shape)} is no one-bit mask of "
            f"{base.numel()} weights; it takes uint8 ({cdiv(base.numel(), 8)},)."
        )
    if dispatch(out, base, path).path == "torch":
        torch_path(out, base, delta, packed, scale)
    else:
        torch.ops.cogmerge.masked_delta_apply(out.detach(), base.detach(), delta.detach(), packed, scale)
    return out

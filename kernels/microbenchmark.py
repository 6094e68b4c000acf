"""Time every operation's paths inside a captured CUDA graph; run by ``scripts/gpu_check``.

A case is one operation at the size at which the 7B policy calls it for one observation (the action expert:
the 0.5B policy). Each is timed three ways: the torch path as it stands, the torch path through
`torch.compile`, and the Triton path, all captured, so that launch costs of the host are in none of them. The
same inputs are read again and again and stay in the L2 cache where they fit: these are qualifications, not
proofs. A kernel is switched on by a faster step of the whole policy. Nothing of this has run on a GPU yet.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vla.kernels.action_expert_block import WEIGHTS, action_expert_block
from vla.kernels.add_film_norm import add_film_norm
from vla.kernels.coupled_attention import coupled_attention
from vla.kernels.film_route_select import film_route_select
from vla.kernels.gated_product import gated_product
from vla.kernels.launch import TRITON_INSTALLED
from vla.kernels.masked_delta_apply import masked_delta_apply
from vla.kernels.product_residual import product_residual
from vla.kernels.qkv_rope import qkv_rope
from vla.kernels.scatter_residual import scatter_residual_
from vla.kernels.select_gather_norm import select_gather_norm

CALLS = 20  # of the operation in one captured graph
ROUNDS = 25  # replays timed; the median is reported


@dataclass(frozen=True)
class Case:
    """`run(path)` calls the operation on prepared inputs and returns its floating results."""

    name: str
    run: Callable[[str | None], tuple[Tensor, ...]]


def cases(device: str, dtype: torch.dtype = torch.bfloat16, shrink: int = 1) -> Iterator[Case]:
    """Every operation on `device` at the 7B policy's sizes, widths divided by `shrink`."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    yield _expert_case(random, 896 // shrink, 14 // min(shrink, 14))
    yield from _norm_cases(random, shrink)
    yield from _routing_cases(random, 4096 // shrink)
    heads, width = 32 // min(shrink, 8), 128 // min(shrink, 8)
    for length, action in ((158, 57), (222, 57)):
        q, k, v = (random(1, length, heads, width).transpose(1, 2) for _ in range(3))
        prefix = length - action
        yield Case(
            f"coupled_attention (1, {heads}, {length}, {width}), {action} action rows",
            lambda path, q=q, k=k, v=v, n=prefix: (coupled_attention(q, k, v, n, path=path),),
        )
    shape = (4096 // shrink, 11008 // shrink)
    yield from _product_cases(random, heads, *shape)
    base, delta = random(*shape), random(*shape)
    packed = torch.randint(
        0, 256, ((base.numel() + 7) // 8,), dtype=torch.uint8, device=device, generator=generator
    )
    out = torch.empty_like(base)
    yield Case(
        f"masked_delta_apply {shape}", lambda path: (masked_delta_apply(out, base, delta, packed, path=path),)
    )


def _expert_case(random: Callable[..., Tensor], width: int, heads: int) -> Case:
    """A block of MergeVLA's 0.5B action expert: 8 rows, 64 queries with the state, 512 vision tokens."""
    streams = [random(1, tokens, width) for tokens in (8, 65, 65, 512, 512)]
    weights = [
        random() if name == "gate" else random(width) if "bias" in name or name == "norm"
        else random(width, width) / width**0.5
        for name in WEIGHTS
    ]  # fmt: skip
    return Case(
        f"action_expert_block (1, 8, {width}), {heads} heads, 65 + 512 keys",
        lambda path: (action_expert_block(*streams, *weights, heads=heads, path=path),),
    )


def _product_cases(random: Callable[..., Tensor], heads: int, width: int, hidden: int) -> Iterator[Case]:
    """The products of a decoder layer on the mean of what LFP keeps: one tile of rows."""
    x, wide = random(1, 128, width), random(1, 128, hidden)
    gate, up = (random(hidden, width) / width**0.5 for _ in range(2))
    yield Case(
        f"gated_product (1, 128, {width}) to {hidden}",
        lambda path: (gated_product(x, gate, up, path=path),),
    )
    down = random(width, hidden) / hidden**0.5
    yield Case(
        f"product_residual (1, 128, {hidden}) to {width}",
        lambda path: (product_residual(x, wide, down, path=path),),
    )
    q, k, v = (random(width, width) / width**0.5 for _ in range(3))
    angle = random(1, 128, width // heads).float()
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    yield Case(
        f"qkv_rope (1, 128, {width}), {heads} heads",
        lambda path: qkv_rope(x, q, k, v, cos, sin, path=path),
    )


def _norm_cases(random: Callable[..., Tensor], shrink: int) -> Iterator[Case]:
    for norm, tokens, width in (("layer", 320, 1152), ("layer", 325, 1024), ("rms", 128, 4096)):
        width //= shrink
        x, a = random(1, tokens, width), random(1, tokens, width)
        gamma, beta, weight = random(1, width), random(1, width), random(width)
        bias = random(width) if norm == "layer" else None
        arguments = (x, a, gamma, beta, weight, bias, norm)
        yield Case(
            f"add_film_norm {norm} (1, {tokens}, {width})",
            lambda path, arguments=arguments: add_film_norm(*arguments, path=path),
        )


def _routing_cases(random: Callable[..., Tensor], width: int) -> Iterator[Case]:
    x, direction, weight = random(1, 128, width), random(1, width).float() / width**0.5, random(width)
    offset, k = random(1).float(), 67
    index, gate, rstd = film_route_select(x, direction, offset, k, 2.0, path="torch")
    residual, update = random(1, k, width), random(1, k, width)
    yield Case(
        f"film_route_select (1, 128, {width}), keep {k}",
        lambda path: film_route_select(x, direction, offset, k, 2.0, path=path)[1:],
    )
    yield Case(
        f"select_gather_norm (1, 128, {width}), keep {k}",
        lambda path: select_gather_norm(x, index, rstd, weight, gate, path=path),
    )
    into = x.clone()
    yield Case(
        f"scatter_residual_ (1, 128, {width}), keep {k}",
        lambda path: (scatter_residual_(into, index, residual, update, gate, path=path),),
    )


def kernel_failures() -> tuple[type[Exception], ...]:
    """What a kernel that does not fit this GPU raises: CUDA's errors and Triton's."""
    if not TRITON_INSTALLED:
        return (RuntimeError,)
    from triton.errors import TritonError

    return (RuntimeError, TritonError)


def compiled(case: Case, backend: str = "inductor") -> Callable[[], tuple[Tensor, ...]]:
    """The torch path of `case` through torch's compiler, as one graph.

    The compiler forgets the case before: all share a line of code, whose recompilations it limits to eight.
    """
    torch.compiler.reset()
    return torch.compile(lambda: case.run("torch"), fullgraph=True, dynamic=False, backend=backend)


def measure(case: Case) -> dict[str, Any]:
    """Microseconds per call of each path of `case`, and how far Triton is from torch (relative norm)."""
    with torch.no_grad():
        # Copied: an operation that writes in place returns the same memory every time.
        want = [result.clone() for result in case.run("torch")]
        got = [result.clone() for result in case.run("triton")]
        row = {
            "name": case.name,
            "torch_us": captured_microseconds(lambda: case.run("torch")),
            "compiled_us": captured_microseconds(compiled(case)),
            "triton_us": captured_microseconds(lambda: case.run("triton")),
            "relative_difference": max(_difference(x, y) for x, y in zip(got, want, strict=True)),
        }
    best = min(row["torch_us"], row["compiled_us"])
    return row | {"gain_over_best": best / row["triton_us"]}


def _difference(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


def captured_microseconds(call: Callable[[], Any]) -> float:
    """Median microseconds of one `call` among `CALLS` in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile and allocate before the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times)


def measure_all(todo: Iterable[Case], deadline: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the cases `todo`, and the names of those that `deadline` (`time.monotonic`) left out.

    A case that CUDA or Triton stops has a row with its ``error``: the others are still worth their time.
    """
    rows, left_out = [], []
    for case in todo:
        if time.monotonic() >= deadline:
            left_out.append(case.name)
            continue
        try:
            rows.append(measure(case))
        except kernel_failures() as error:
            rows.append({"name": case.name, "error": " ".join(str(error).split())[:500]})
    return rows, left_out

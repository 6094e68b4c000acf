"""K8, batched experts: what it costs that every sample of a batch has an expert of its own.

One linear layer, `samples` of `tokens` rows each, `experts` in turn. Three ways to add ``B_e A_e x`` to the
base's product, beside that product alone:

grouped   `vla.experts.grouped_lora`: two batched products over gathered factors, as the expert bank runs it
loop      expert by expert: take its rows, two products, put them back
merged    a weight matrix per sample, ``W + B_e A_e`` computed before: what no factors would cost

Every VLA sample has as many tokens as any other, so segments are equal and a batched product is enough; a
kernel for ragged segments has nothing to add. The goal is at most 10 % over the base at B = 8 and E = 4.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.experts.grouped_lora import FactorStack, add_grouped_lora


def run(
    samples: int = 8,
    experts: int = 4,
    tokens: int = 128,
    inputs: int = 896,
    outputs: int = 4864,
    rank: int = 32,
    calls: int = 30,
    threads: int = 1,
) -> list[dict[str, Any]]:
    """Median milliseconds of `calls` each, in turns; by default the widest layer of the 0.5B decoder."""
    torch.set_num_threads(threads)
    ways = make_ways(samples, experts, tokens, inputs, outputs, rank)
    with torch.no_grad():
        seconds = time_in_turns(ways, calls)
    base = 1e3 * seconds.pop("base")
    shape = f"B={samples}, E={experts}, N={tokens}, {inputs} to {outputs}, r={rank}"
    return [
        {
            "name": f"{way}, {shape}",
            "value": 1e3 * value,
            "unit": "ms",
            "baseline": "base product alone",
            "baseline_value": base,
            "ratio": 1e3 * value / base,
        }
        for way, value in seconds.items()
    ]


def make_ways(
    samples: int, experts: int, tokens: int, inputs: int, outputs: int, rank: int
) -> dict[str, Callable[[], Tensor]]:
    """The ways by name, on the same random numbers: each returns (samples, tokens, outputs)."""
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).mul(size[-1] ** -0.5).to(dtype)

    x, weight = random(samples, tokens, inputs), random(outputs, inputs)
    factors = FactorStack(random(experts, rank, inputs), random(experts, outputs, rank), (rank,) * experts)
    rows = torch.arange(samples) % experts  # on the CPU, as the bank keeps them
    merged = (weight + factors.b @ factors.a)[rows]
    return {
        "base": lambda: F.linear(x, weight),
        "grouped": lambda: add_grouped_lora(F.linear(x, weight), x, factors, rows),
        "loop": lambda: F.linear(x, weight) + loop_over_experts(x, factors, rows),
        "merged": lambda: torch.bmm(x, merged.mT),
    }


def loop_over_experts(x: Tensor, factors: FactorStack, rows: Tensor) -> Tensor:
    """``B_e A_e x`` of every sample, one expert after the other."""
    out = x.new_empty(*x.shape[:-1], factors.b.shape[1])
    for expert in range(len(factors.ranks)):
        mine = (rows == expert).nonzero().flatten()
        out[mine] = F.linear(F.linear(x[mine], factors.a[expert]), factors.b[expert])
    return out


def time_in_turns(ways: dict[str, Callable[[], Tensor]], calls: int) -> dict[str, float]:
    """Median seconds per call; the ways take turns, so that a busy moment hits them all."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for call in range(calls + 3):
        for name, way in ways.items():
            begin = _now()
            way()
            if call >= 3:
                seconds[name].append(_now() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()

"""Which Triton kernels make a captured step of the whole policy faster: what belongs into `QUALIFIED`.

The engine's step in bf16 is captured without any kernel of ours, then with one switch of `SWITCHES` more at a
time; a switch stays on if the step got faster by at least `GAIN`. So each is measured among those that stay,
as it would run. Before that, all switches together must give the actions of none in fp32. Needs a CUDA GPU.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from benchmarks.latency import load_preset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vla.errors import UserError
from vla.kernels.dispatch import qualified
from vla.kernels.microbenchmark import kernel_failures
from vla.policy.checkpoint import LoadedPolicy
from vla.runtime.engine import PolicyEngine
from vla.runtime.policy_step import PolicyStep
from vla.runtime.probe import random_requests
from vla.runtime.program import MODES, Program

SWITCHES = (
    ("coupled_attention",),
    ("add_film_norm",),
    ("film_route_select", "select_gather_norm"),  # the second reads what the first computes on the way
    ("scatter_residual",),
    ("gated_product",),
    ("product_residual",),
    ("qkv_rope",),
    ("action_expert_block",),
)
"""Operations that policies call, in the order in which they are tried."""
GAIN = 0.01
ROUNDS = 40
PRESETS = ("nano", "mergevla-0.5b")
Step = Callable[[], Tensor]
"""One step on a fixed observation: actions (1, K, D)."""


def run(presets: tuple[str, ...] = PRESETS, seconds: float = 600.0) -> list[dict[str, Any]]:
    """Measure `presets` for about `seconds`; raise `UserError` without a CUDA GPU."""
    if not torch.cuda.is_available():
        raise UserError("scripts/bench policy_kernels needs a CUDA GPU: there is none here.")
    found = measure(presets, time.monotonic() + seconds)
    return [
        {
            "name": f"{one['preset']}: with {row['switch']}",
            "value": row["with_ms"],
            "unit": "ms",
            "baseline": "without",
            "baseline_value": row["without_ms"],
            "ratio": row["ratio"],
        }
        for one in found
        for row in one["rows"]
    ]


def measure(presets: Sequence[str], deadline: float) -> list[dict[str, Any]]:
    """What `try_switches` found per preset, and how far all kernels move the actions in fp32.

    ``left_out`` names what `deadline` (`time.monotonic`) left no time for.
    """
    found = []
    for preset in presets:
        if time.monotonic() >= deadline:
            found.append(
                {
                    "preset": preset,
                    "rows": [],
                    "kept": [],
                    "failed": {},
                    "left_out": ["all"],
                    "not_called": [],
                }
            )
            continue
        loaded = load_preset(preset, torch.device("cuda"))
        try:
            difference = fp32_difference(loaded)
        except kernel_failures():  # which of them, the switches tell
            difference = math.inf
        called = called_operations(lambda ops, loaded=loaded: eager_step(loaded, ops))
        tried = try_switches(
            lambda ops, loaded=loaded: captured_step(loaded, ops), in_turns, deadline, called
        )
        found.append({"preset": preset, "fp32_difference": difference, **tried})
        del loaded
        torch.cuda.empty_cache()
    return found


def captured_step(loaded: LoadedPolicy, ops: Sequence[str], mode: str = "bf16") -> Step:
    """The engine's step in `mode` with the Triton kernels of `ops` and no others, on one observation."""
    step, request = PolicyStep(loaded), random_requests(loaded.contract, 1)[0]
    engine = PolicyEngine(loaded, mode)
    observation = engine.observe([request])
    tokens, valid = (t.to(engine.device) for t in step.tokens([request[2]]))
    with qualified(ops):
        program = Program(step, tokens, valid, observation, MODES[mode])
    constants = program.instruction(tokens, valid)
    return lambda: program(observation, constants)


def eager_step(loaded: LoadedPolicy, ops: Sequence[str]) -> None:
    """One step in bf16 that is not captured, with the Triton kernels of `ops` and no others."""
    device = next(loaded.policy.parameters()).device
    with qualified(ops), torch.autocast(device.type, torch.bfloat16):
        loaded.act(*random_requests(loaded.contract, 1)[0])


def called_operations(run: Callable[[Sequence[str]], object]) -> set[str]:
    """Which operations of `SWITCHES` `run` calls where each is on alone.

    Another decoder or action head may leave no place for one: its time would differ by chance only. One that
    CUDA or Triton stops counts as called, for `try_switches` to tell.
    """
    called = set()
    for switch in SWITCHES:
        with _Calls() as calls:
            try:
                run(switch)
            except kernel_failures():
                called.update(switch)
        called |= calls.names & set(switch)
    return called


class _Calls(TorchDispatchMode):
    """Names of our custom operations that were called."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "cogmerge":
            self.names.add(function.name().split("::")[1])
        return function(*args, **kwargs or {})


def fp32_difference(loaded: LoadedPolicy) -> float:
    """Relative difference between the actions with all kernels and with none."""
    none, every = (captured_step(loaded, ops, "fp32")() for ops in ((), [op for s in SWITCHES for op in s]))
    return ((every - none).norm() / none.norm()).item()


def try_switches(
    build: Callable[[Sequence[str]], Step],
    time_both: Callable[[Step, Step], tuple[float, float]],
    deadline: float,
    called: Collection[str],
) -> dict[str, Any]:
    """Turn on one switch after the other and keep what makes the step faster.

    `build` makes a step with some operations on; `time_both` returns the milliseconds of two steps. A switch
    that CUDA or Triton stops is in ``failed``, with the reason; one of which the policy calls nothing, as
    `called` says, in ``not_called``.
    """
    kept: list[str] = []
    rows, left_out, failed, not_called = [], [], {}, []
    best = build(kept)
    for switch in SWITCHES:
        name = " + ".join(switch)
        if not set(switch) & set(called):
            not_called.append(name)
            continue
        if time.monotonic() >= deadline:
            left_out.append(name)
            continue
        try:
            step = build([*kept, *switch])
            without_ms, with_ms = time_both(best, step)
        except kernel_failures() as error:
            failed[name] = " ".join(str(error).split())[:500]
            continue
        stays = with_ms <= (1 - GAIN) * without_ms
        ratio = with_ms / without_ms
        rows.append(
            {"switch": name, "with_ms": with_ms, "without_ms": without_ms, "ratio": ratio, "kept": stays}
        )
        if stays:
            kept, best = [*kept, *switch], step
    return {"rows": rows, "kept": kept, "left_out": left_out, "failed": failed, "not_called": not_called}


def in_turns(first: Step, second: Step) -> tuple[float, float]:
    """Median milliseconds of two steps on the GPU, in turns, so that its clock drifts under both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for step, taken in zip((first, second), times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end))
    return statistics.median(times[0]), statistics.median(times[1])


def to_qualify(found: Sequence[dict[str, Any]]) -> list[str]:
    """Operations that made a preset's step faster and no other preset's slower, sorted."""
    slower = {row["switch"] for one in found for row in one["rows"] if row["ratio"] > 1 + GAIN}
    lost = {op for switch in slower for op in switch.split(" + ")}
    return sorted({op for one in found for op in one["kept"]} - lost)

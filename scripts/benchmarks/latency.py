"""Latency of one policy step at batch 1, by stage and by way of running it, beside the computed floor.

eager     the policy as `vla eval` runs it
compiled  the same, with vision, decoder and head through torch.compile
runtime   `vla.runtime.engine` in each of its modes: one graph, so that it has no stages inside

Stages: pre (resize, tokens, normalise), vision, decoder, head, post (un-normalise). They are timed by hooks,
in calls of their own; "total" is timed without. Values are medians, with p95 in the JSON. Weights are
untrained but for nano's: latency does not depend on them, errors of reduced precision do.

The floor of a stage is reading its weights once or computing its products, whichever is longer, at the rates
that this machine reaches in a plain copy and a plain matrix product just before (fp32 on a CPU, bf16 on a
GPU). It is a floor of the eager and compiled figures: bf16 and int8 on a CPU, and what is computed once per
instruction, may go below it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla.contract import ACTION_KEY, OSC_POSE_DELTA, STATE_KEY, Camera, Interface, Vector
from vla.evaluation.policy_source import SHIPPED_CHECKPOINT
from vla.inspection import count_operations, preset_policy
from vla.policy.checkpoint import LoadedPolicy, load_checkpoint
from vla.policy.manifest import make_contract
from vla.policy.presets import PRESETS
from vla.policy.processor_cogmerge import make_cogmerge_pre_post_processors
from vla.runtime.engine import PolicyEngine, Request
from vla.runtime.probe import random_requests, relative_error
from vla.runtime.program import MODES, modes_for

STAGES = ("pre", "vision", "decoder", "head", "post")
PARTS = {"vision": "vision", "decoder": "decoder", "head": "action_decoder"}
Seconds = dict[str, list[float]]


def run(
    presets: tuple[str, ...] = tuple(PRESETS),
    calls: int = 50,
    warm_up: int = 5,
    compiled: bool = True,
    threads: int = 1,
) -> list[dict[str, Any]]:
    """Measure `calls` steps per way of running each of `presets`; one that memory cannot hold is left out.

    ``--no-compiled`` leaves out everything that goes through torch's compiler, which takes minutes to build.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = measure_rates(device)
    rows = []
    for name in presets:
        needed = memory_needed(name)
        if needed > available_memory(device):
            print(f"{name} needs {needed / 1e9:.0f} GB, more than is free: left out.", file=sys.stderr)
            continue
        rows += measure_preset(name, device, rates, calls, warm_up, compiled)
    return rows


def measure_preset(
    name: str, device: torch.device, rates: tuple[float, float], calls: int, warm_up: int, compiled: bool
) -> list[dict[str, Any]]:
    """Rows of one preset."""
    loaded = load_preset(name, device)
    request = random_requests(loaded.contract, 1)[0]
    floors = stage_floors(loaded, rates)
    eager = time_policy(loaded, request, calls, warm_up)
    rows = stage_rows(f"{name} eager", eager, floors)
    modes = [mode for mode in modes_for(device) if compiled or not MODES[mode].compiled]
    for mode in modes:
        engine = PolicyEngine(loaded, mode)
        seconds = {"total": time_calls(lambda engine=engine: engine.act(*request), calls, warm_up)}
        rows += stage_rows(f"{name} runtime {mode}", seconds, floors)
        rows.append(speed_up(f"{name} runtime {mode}", seconds, eager))
        error = relative_error(engine, loaded)
        rows.append(_row(f"{name} runtime {mode}: relative error of the actions", error, "", "eager", None))
    if compiled:
        with compiled_parts(loaded):
            seconds = time_policy(loaded, request, calls, warm_up)
        rows += stage_rows(f"{name} compiled", seconds, floors)
        rows.append(speed_up(f"{name} compiled", seconds, eager))
    return rows


def load_preset(name: str, device: torch.device) -> LoadedPolicy:
    """The shipped checkpoint for nano; any other preset untrained, with the shipped tokenizer."""
    if name == "nano" and SHIPPED_CHECKPOINT.exists():
        return load_checkpoint(SHIPPED_CHECKPOINT, str(device))
    policy = preset_policy(name, tokenizer="nano").to(device).eval()
    config = policy.config
    config.device = str(device)
    interface = Interface(
        cameras=tuple(Camera(key, 256, 256) for key in config.camera_keys),
        state=Vector(STATE_KEY, tuple(f"state_{i}" for i in range(config.state_dim))),
        action=Vector(ACTION_KEY, tuple(f"action_{i}" for i in range(config.action_dim))),
        action_space=OSC_POSE_DELTA,
        control_rate=20.0,
    )
    numbers = {"min": -1.0, "max": 1.0, "mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
    sizes = {STATE_KEY: config.state_dim, ACTION_KEY: config.action_dim}
    statistics = {key: {n: [value] * size for n, value in numbers.items()} for key, size in sizes.items()}
    stats = {
        key: {n: torch.tensor(values) for n, values in entry.items()} for key, entry in statistics.items()
    }
    processors = make_cogmerge_pre_post_processors(config, stats)
    return LoadedPolicy(policy, *processors, make_contract(config, interface, statistics), {}, Path(name))


def time_policy(loaded: LoadedPolicy, request: Request, calls: int, warm_up: int) -> Seconds:
    """Seconds per stage and in total."""
    seconds = {"total": time_calls(lambda: loaded.act(*request), calls, warm_up)}
    with stage_timers(loaded) as timed:
        for _ in range(warm_up + calls):
            _timed(timed["pre"], lambda: loaded.preprocessor(loaded.batch(*request)))
            batch = loaded.preprocessor(loaded.batch(*request))
            chunk = loaded.policy.predict_action_chunk(batch)
            _timed(timed["post"], lambda chunk=chunk: loaded.finish(chunk))
    return seconds | {stage: values[warm_up:] for stage, values in timed.items()}


@contextmanager
def stage_timers(loaded: LoadedPolicy) -> Iterator[Seconds]:
    """Time vision, decoder and head of every forward pass into the lists that are yielded."""
    timed: Seconds = {stage: [] for stage in STAGES}
    handles = []
    for stage, part in PARTS.items():
        module, began = getattr(loaded.policy.model, part), []

        def before(*_: Any, began: list[float] = began) -> None:
            began.append(_now())

        def after(*_: Any, began: list[float] = began, stage: str = stage) -> None:
            timed[stage].append(_now() - began.pop())

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield timed
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def compiled_parts(loaded: LoadedPolicy) -> Iterator[None]:
    """Run vision, decoder and head through torch's compiler; hooks stay outside of it."""
    parts = [getattr(loaded.policy.model, part) for part in PARTS.values()]
    forwards = [part.forward for part in parts]
    for part in parts:
        part.forward = torch.compile(part.forward, dynamic=False)
    try:
        yield
    finally:
        for part, forward in zip(parts, forwards, strict=True):
            part.forward = forward


def time_calls(call: Callable[[], Any], calls: int, warm_up: int) -> list[float]:
    """Seconds of each of `calls` calls after `warm_up` others."""
    seconds: list[float] = []
    for _ in range(warm_up + calls):
        _timed(seconds, call)
    return seconds[warm_up:]


def _timed(seconds: list[float], call: Callable[[], Any]) -> None:
    begin = _now()
    call()
    seconds.append(_now() - begin)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_rates(device: torch.device) -> tuple[float, float]:
    """Bytes per second of a copy (read and written) and operations per second of a matrix product."""
    gpu = device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    source = torch.ones((1 << 30 if gpu else 1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    product = min(time_calls(lambda: a @ b, 10, 2))
    copy = min(time_calls(lambda: target.copy_(source), 10, 2))
    return 2 * source.numel() * source.element_size() / copy, 2 * side**3 / product


def stage_floors(loaded: LoadedPolicy, rates: tuple[float, float]) -> dict[str, float]:
    """Seconds below which no implementation goes at these rates, for the parts of the model and in total."""
    bandwidth, peak = rates
    operations, model = count_operations(loaded.policy), loaded.policy.model
    width = 2 if next(model.parameters()).device.type == "cuda" else 4
    sizes = {
        stage: sum(p.numel() for p in getattr(model, part).parameters()) for stage, part in PARTS.items()
    }
    floors = {
        stage: max(width * size / bandwidth, operations[PARTS[stage]] / peak) for stage, size in sizes.items()
    }
    total = sum(p.numel() for p in model.parameters())
    return floors | {"total": max(width * total / bandwidth, operations["total"] / peak)}


def memory_needed(name: str) -> float:
    """Bytes for a preset in fp32 and for a second precision beside it."""
    with torch.device("meta"):
        return 6.0 * sum(p.numel() for p in preset_policy(name, tokenizer="nano").parameters())


def available_memory(device: torch.device) -> float:
    """Bytes that are free on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def stage_rows(label: str, seconds: Seconds, floors: dict[str, float]) -> list[dict[str, Any]]:
    """One row per stage, in milliseconds, with the floor where there is one."""
    rows = []
    for stage in (*STAGES, "total"):
        if stage in seconds:
            p50, p95 = np.percentile(seconds[stage], [50, 95])
            floor = 1e3 * floors[stage] if stage in floors else None
            rows.append(_row(f"{label}: {stage}", 1e3 * p50, "ms", "floor", floor) | {"p95": 1e3 * p95})
    return rows


def speed_up(label: str, seconds: Seconds, eager: Seconds) -> dict[str, Any]:
    """How many times as fast as eager, by medians of the totals."""
    ours, theirs = (1e3 * float(np.median(values["total"])) for values in (seconds, eager))
    row = _row(f"{label}: speed-up over eager", theirs / ours, "x", "eager, ms", theirs)
    return row | {"ratio": theirs / ours}


def _row(name: str, value: float, unit: str, baseline: str, baseline_value: float | None) -> dict[str, Any]:
    ratio = None if baseline_value is None else value / baseline_value
    return {
        "name": name,
        "value": float(value),
        "unit": unit,
        "baseline": baseline if baseline_value is not None else None,
        "baseline_value": baseline_value,
        "ratio": ratio,
    }

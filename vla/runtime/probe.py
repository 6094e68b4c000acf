"""Which mode of the engine is fastest: measured once per machine, versions and architecture.

Speeds are kept on disk; they do not depend on the weights. What a mode does to the actions does, so that it
is measured for every checkpoint before its mode is taken.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla import __version__
from vla.atomic import write_text
from vla.contract import ACTION_KEY, STATE_KEY, PolicyContract
from vla.policy.checkpoint import LoadedPolicy
from vla.runtime.engine import PolicyEngine, Request
from vla.runtime.program import modes_for

INSTRUCTION = "pick up the alphabet soup and place it in the basket"
OBSERVATIONS, ROUNDS, CALLS = 4, 5, 5
_COSTS_NOTHING = ("optimizer_", "scheduler_", "pretrained_", "repo_", "push_", "license", "private", "tags")


def fastest_mode(loaded: LoadedPolicy, tolerance: float) -> str:
    """Return the fastest mode whose `relative_error` is at most `tolerance`.

    The first call for an architecture builds and times every mode, which takes minutes: torch's compiler is
    among them. "fp32" needs no proof: it differs by the order of its sums.
    """
    speeds = mode_speeds(loaded)
    for mode in sorted(speeds, key=speeds.__getitem__):
        if mode == "fp32" or relative_error(PolicyEngine(loaded, mode), loaded) <= tolerance:
            return mode
    return "fp32"


def mode_speeds(loaded: LoadedPolicy) -> dict[str, float]:
    """Seconds per observation by mode: from the cache, or measured now and kept."""
    facts = json.dumps(deciding_facts(loaded), sort_keys=True, default=str)
    path = cache_folder() / f"{hashlib.sha256(facts.encode()).hexdigest()[:24]}.json"
    modes = modes_for(next(loaded.policy.parameters()).device)
    try:
        speeds = json.loads(path.read_text())["seconds"]
        if set(speeds) == set(modes):
            return speeds
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none there, or one that an older release or a full disk left behind
    request = random_requests(loaded.contract, 1)[0]
    speeds = measure({mode: PolicyEngine(loaded, mode) for mode in modes}, request)
    write_text(path, json.dumps({"facts": json.loads(facts), "seconds": speeds}, indent=1) + "\n")
    return speeds


def cache_folder() -> Path:
    """Where speeds are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cogmerge" / "runtime"


def deciding_facts(loaded: LoadedPolicy) -> dict[str, Any]:
    """Everything that decides which mode is fastest."""
    config, device = loaded.policy.config, next(loaded.policy.parameters()).device
    return {
        "machine": [platform.node(), platform.machine(), os.cpu_count(), torch.get_num_threads()],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "versions": {"vla": __version__} | {name: version(name) for name in ("torch", "transformers")},
        "cameras": [[camera.height, camera.width] for camera in loaded.contract.interface.cameras],
        "architecture": {
            field.name: getattr(config, field.name)
            for field in fields(config)
            if not field.name.startswith(_COSTS_NOTHING)
        },
    }


def measure(engines: Mapping[str, PolicyEngine], request: Request) -> dict[str, float]:
    """Median seconds per call by name; the engines take turns, so that a busy moment hits them all."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.act(*request)  # builds the program
        engine.act(*request)
    for _, (name, engine) in itertools.product(range(ROUNDS), engines.items()):
        for _ in range(CALLS):
            begin = time.perf_counter()
            engine.act(*request)
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def relative_error(engine: PolicyEngine, loaded: LoadedPolicy, count: int = OBSERVATIONS) -> float:
    """``||a - b|| / ||b||`` over the actions of `count` random observations, in normalised units.

    `a` are the engine's and `b` the policy's own, mapped to [-1, 1] by the range of each action entry.
    """
    requests = random_requests(loaded.contract, count)
    low, high = (np.asarray(loaded.contract.statistics[ACTION_KEY][name]) for name in ("min", "max"))
    middle, half = (low + high) / 2, np.where(high > low, (high - low) / 2, 1.0)
    expected = (np.stack([loaded.act(*request) for request in requests]) - middle) / half
    got = (np.stack([engine.act(*request) for request in requests]) - middle) / half
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def random_requests(contract: PolicyContract, count: int) -> list[Request]:
    """Smooth random images and states from the training data's distribution; always the same ones."""
    generator = np.random.default_rng(0)
    requests = []
    for _ in range(count):
        images = {
            camera.key: _blobs(generator, camera.height, camera.width)
            for camera in contract.interface.cameras
        }
        state = np.empty(0, np.float32)
        if contract.interface.state is not None:
            mean, std = (np.asarray(contract.statistics[STATE_KEY][name]) for name in ("mean", "std"))
            state = generator.normal(mean, std).astype(np.float32)
        requests.append((images, state, INSTRUCTION))
    return requests


def _blobs(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """An image (H, W, 3) uint8 of 16 x 16 flat patches: unlike white noise, it survives a resize."""
    rows, columns = -(-height // 16), -(-width // 16)
    patches = generator.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return np.ascontiguousarray(patches.repeat(16, 0).repeat(16, 1)[:height, :width])

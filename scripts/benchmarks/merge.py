"""Merging at a preset's shapes with random weights: time and peak memory of every method, and task switches.

Each method merges in a process of its own, base and experts streamed from disk; its peak is held against what
`vla merge` promises: 4 x the largest tensor x the experts + 500 MB, torch and all other imports included
(which take 500 MB and more by themselves: at the size of nano they are all that is measured). A task switch
applies packed one-bit masks to live weights in memory; the baseline loads a checkpoint of the same size from
disk (from the page cache, if it fits) into the same live weights.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from vla.experts.bank_folder import BankFolder
from vla.experts.live_merge import LiveMerge
from vla.experts.lora_expert import BASE_WEIGHTS_FILE, LoraExpert, declare, make_config
from vla.experts.merge import EXPERTS_FOLDER, MASK_FILE
from vla.experts.merged import MergedCheckpoint
from vla.experts.merging.registry import METHODS
from vla.experts.tensor_stream import Slot, TensorFile, TensorWriter
from vla.inspection import preset_policy

PEAK = "peak memory"
#: VmHWM belongs to the address space and starts anew with exec.
PROGRAM = """
import json, re, sys, time
from pathlib import Path
from vla.experts.merge import merge
from vla.experts.recipe import load_recipe
begin = time.perf_counter()
merge(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]))
seconds = time.perf_counter() - begin
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"seconds": seconds, "peak": peak}))
"""


def run(
    preset: str = "mergevla-0.5b",
    rank: int = 64,
    experts: int = 4,
    methods: tuple[str, ...] = tuple(METHODS),
    wudi_steps: int = 300,
    dtype: str = "bfloat16",
    switches: int = 8,
    folder: Path | None = None,
) -> list[dict[str, Any]]:
    """Merge with every method, switch tasks, and let an expert come to a bank and go.

    Args:
        preset: Whose shapes; every linear layer has factors.
        rank: Of every expert.
        experts: How many.
        methods: Which methods.
        wudi_steps: Optimisation steps of WUDI.
        dtype: Of the base's weights.
        switches: Task switches, and reloads, to take the median of.
        folder: Where base, experts and merges lie meanwhile: 16 GB for the default.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        root = Path(place)
        shapes, linear = preset_shapes(preset)
        write_base(root / "base", shapes, getattr(torch, dtype))
        names = [f"expert{m}" for m in range(experts)]
        for seed, name in enumerate(names):
            write_expert(
                root / name,
                root / "base",
                {module: shapes[f"{module}.weight"] for module in linear},
                rank,
                seed,
            )
        rows = []
        largest = max(torch.Size(shapes[f"{module}.weight"]).numel() for module in linear) * 4
        for method in methods:
            options = {"steps": wudi_steps} if method == "wudi" else {}
            rows += _method_rows(root, names, method, options, 4 * largest * experts + 500_000_000)
        return rows + _switch_rows(root, switches) + _bank_rows(root, names, rows[0])


def preset_shapes(preset: str) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes of a preset's parameters and the names of its linear layers; nothing is allocated."""
    with torch.device("meta"):
        policy = preset_policy(preset)
    shapes = {name: tuple(parameter.shape) for name, parameter in policy.named_parameters()}
    return shapes, [name for name, module in policy.named_modules() if isinstance(module, nn.Linear)]


def write_base(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Stream random weights of deviation 0.02 to disk."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    writer = TensorWriter(
        folder / BASE_WEIGHTS_FILE, {name: Slot(dtype, shape) for name, shape in shapes.items()}
    )
    for name, shape in shapes.items():
        writer.write(name, (torch.randn(shape, generator=generator) * 0.02).to(dtype))
    writer.close()
    (folder / "config.json").write_text("{}")


def write_expert(
    folder: Path, base: Path, shapes: Mapping[str, tuple[int, int]], rank: int, seed: int
) -> None:
    """Save an expert whose updates have a deviation of about 3e-4."""
    generator = torch.Generator().manual_seed(seed + 1)
    tensors, ranks = {}, {}
    for module, (m, n) in shapes.items():
        ranks[module] = min(rank, m, n)
        tensors[f"{module}.lora_A.weight"] = torch.randn(ranks[module], n, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(m, ranks[module], generator=generator) * 2e-5
    LoraExpert(make_config(ranks, 2 * rank), tensors).save(folder)
    declare(folder, folder.name, base)


def _method_rows(
    root: Path, names: list[str], method: str, options: dict, limit: float
) -> list[dict[str, Any]]:
    recipe: dict[str, Any] = {
        "version": 1,
        "base": "base",
        "experts": names,
        "method": method,
        "null_model": False,
    }
    recipe |= {"options": options} if options else {}
    recipe |= {} if METHODS[method].own_masks else {"lambda": 0.6}
    path = root / f"{method}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-c", PROGRAM, path, root / "merged"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    if done.returncode:
        raise SystemExit(f"merging with {method} failed:\n{done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1])
    return [
        _row(f"{method}: time", result["seconds"], "s"),
        _row(f"{method}: {PEAK}", result["peak"] / 1e6, "MB", "promised", limit / 1e6),
    ]


def _switch_rows(root: Path, switches: int) -> list[dict[str, Any]]:
    """Switch through the tasks of the merge made last, against loading that many checkpoints."""
    merged = MergedCheckpoint.open(root / "merged")
    live = dict(TensorFile(merged.folder / BASE_WEIGHTS_FILE).items())
    merge, count = LiveMerge(merged, live), len(merged.experts)
    merge.switch(0)  # the first also brings everything into memory

    def reload(_: int) -> None:
        for name, value in load_file(merged.folder / BASE_WEIGHTS_FILE).items():
            live[name].copy_(value)

    seconds = _median(lambda i: merge.switch((i + 1) % count), switches)
    baseline = _median(reload, switches)
    masks = [TensorFile(merged.folder / EXPERTS_FOLDER / name / MASK_FILE) for name in merged.experts]
    packed = sum(value.numel() for value in masks[0].values())
    weights = sum(torch.Size(shape).numel() for shape in json.loads(masks[0].metadata["shapes"]).values())
    return [
        _row("task switch, packed masks", seconds * 1e3, "ms", "reloading a checkpoint", baseline * 1e3),
        _row("mask of one task", packed / 1e6, "MB", "one byte per weight", weights / 1e6),
    ]


def _bank_rows(root: Path, names: list[str], merge: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the bank does instead of merging anew when the last expert comes or goes."""
    bank = BankFolder.create(root / "bank", root / "base", [root / name for name in names[:-1]])
    begin = time.perf_counter()
    bank = bank.add(root / names[-1])
    added = time.perf_counter()
    bank.remove(names[-1])
    seconds = {"adding": added - begin, "removing": time.perf_counter() - added}
    return [
        _row(f"bank: {what} an expert", s, "s", merge["name"], merge["value"]) for what, s in seconds.items()
    ]


def _median(action: Callable[[int], None], times: int) -> float:
    seconds = []
    for i in range(times):
        begin = time.perf_counter()
        action(i)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _row(
    name: str, value: float, unit: str, baseline: str | None = None, against: float | None = None
) -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "baseline_value": against,
        "ratio": value / against if against else None,
    }

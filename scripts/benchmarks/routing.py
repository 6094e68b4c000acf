"""Token routing on one set of weights and inputs: tokens, FLOPs and latency by reducer, pruner and mask.

The weights are those of a checkpoint (the shipped one by default); parts that a variant does not have are
left out and parts that it adds start untrained, which changes actions but not cost. Each family is compared
with its own do-nothing member. All variants are timed in turn, round after round, in one process.
Dropping tokens for good and skipping a layer cost the same here: both compute on what is kept.

Success is what `vla eval` has found for policies that were trained with their variant (``--evaluations``).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vla.errors import UserError
from vla.evaluation.policy_source import SHIPPED_CHECKPOINT
from vla.policy.checkpoint import load_checkpoint
from vla.policy.configuration_cogmerge import MASKS, PRUNERS, REDUCERS
from vla.policy.instruction import encode
from vla.policy.modeling_cogmerge import CogMergePolicy

INSTRUCTION = "pick up the alphabet soup and place it in the basket"
BIAS_BATCH = 64
BASELINES = {"vision_reducer": "none", "token_pruner": "none", "attention_mask": "coupled"}
"""What each family is compared with."""
FAMILIES = {
    "token_pruner": PRUNERS,
    "vision_reducer": REDUCERS,
    "attention_mask": MASKS,
}


def run(
    checkpoint: Path = SHIPPED_CHECKPOINT,
    batch: int = 1,
    rounds: int = 7,
    calls: int = 20,
    seed: int = 0,
    evaluations: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """Measure `rounds` of `calls` forward passes per variant; return rows with the medians.

    `evaluations` are NAME=FOLDER, a variant and what `vla eval` wrote about it; the first is the baseline.
    """
    measured = success(evaluations)
    torch.manual_seed(seed)
    source = load_checkpoint(Path(checkpoint)).policy
    inputs = observation(source.config, batch)
    rows = []
    for family, names in FAMILIES.items():
        models = {name: variant(source, **{family: name}).model.eval() for name in names}
        costs = {name: flops(model, inputs) for name, model in models.items()}
        tokens = {name: tokens_computed(model, inputs) for name, model in models.items()}
        seconds = latencies(models, inputs, rounds, calls)
        baseline = BASELINES[family]
        for name in names:
            label = f"{family.split('_')[1]} {name}"
            rows += [
                _row(f"{label}: tokens x layers", tokens, name, baseline, "tokens", 1),
                _row(f"{label}: FLOPs", costs, name, baseline, "MFLOP", 1e-6),
                _row(f"{label}: latency", seconds, name, baseline, "ms", 1e3),
            ]
        if family == "token_pruner":
            rows += position_bias(models, observation(source.config, BIAS_BATCH))
    return rows + measured


def success(evaluations: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return one row per suite and evaluation. Raises `UserError` for an unfinished one."""
    found: dict[str, dict[str, dict]] = {}
    for entry in evaluations:
        name, _, folder = entry.partition("=")
        try:
            found[name] = json.loads((Path(folder) / "summary.json").read_text())["suites"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"--evaluations {entry}: there is no finished evaluation ({error}); write NAME=FOLDER of"
                " `vla eval --out FOLDER`."
            ) from None
    baseline = next(iter(found), "")
    rows = []
    for name, suites in found.items():
        for suite in suites.keys() & found[baseline].keys():
            counts, dense = suites[suite], found[baseline][suite]["rate"]
            low, high = (100 * bound for bound in counts["interval"])
            solved = f"{counts['successes']} of {counts['episodes']} ({low:.1f}-{high:.1f})"
            rows.append(
                {
                    "name": f"{suite}, {name}: {solved}",
                    "value": 100 * counts["rate"],
                    "unit": "%",
                    "baseline": baseline,
                    "baseline_value": 100 * dense,
                    "ratio": counts["rate"] / dense if dense else None,
                }
            )
    return rows


def position_bias(models: dict[str, Any], inputs: tuple[torch.Tensor, ...]) -> list[dict[str, Any]]:
    """Return where in the image the tokens that the last layer keeps stand: the mean row, 0 at the top.

    The images are noise, so that no row deserves more than another: the baseline is the middle row.
    """
    rows = []
    for name, model in models.items():
        trace: dict[str, Any] = {}
        with torch.inference_mode():
            model(*inputs, trace)
        if "kept" not in trace:
            continue
        _, height, width = model.decoder.grid
        kept = trace["kept"][max(trace["kept"])]
        mean, middle = float((kept // width % height).double().mean()), (height - 1) / 2
        rows.append(
            {
                "name": f"pruner {name}: mean kept row",
                "value": mean,
                "unit": "rows",
                "baseline": "no bias",
                "baseline_value": middle,
                "ratio": mean / middle,
            }
        )
    return rows


def variant(source: CogMergePolicy, **change: str) -> CogMergePolicy:
    """Return a policy with one part exchanged and, where names and shapes agree, the weights of `source`."""
    config = dataclasses.replace(source.config, **change)
    policy = CogMergePolicy(config)
    own = policy.state_dict()
    shared = {name: value for name, value in source.state_dict().items() if name in own}
    policy.load_state_dict(own | shared)
    return policy


def observation(config, batch: int) -> tuple[torch.Tensor, ...]:
    """Random images and states, one instruction: what a forward pass costs does not depend on them."""
    tokens, valid = encode([INSTRUCTION] * batch)
    images = torch.rand(batch, len(config.camera_keys), 3, config.image_size, config.image_size)
    return images, torch.randn(batch, config.state_dim), tokens, valid


def tokens_computed(model, inputs: tuple[torch.Tensor, ...]) -> float:
    """Return the sum over decoder layers of the vision tokens that were computed on."""
    trace: dict[str, Any] = {}
    with torch.inference_mode():
        model(*inputs, trace)
    kept = trace.get("kept", {})
    layers = range(len(model.decoder.counts))
    return sum(kept[layer].shape[1] if layer in kept else model.decoder.vision_tokens for layer in layers)


def flops(model, inputs: tuple[torch.Tensor, ...]) -> float:
    """Return the floating-point operations of one forward pass, counted by torch."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(*inputs)
    return counter.get_total_flops()


def latencies(models: dict[str, Any], inputs, rounds: int, calls: int) -> dict[str, float]:
    """Return the median over rounds of the seconds per forward pass; the variants take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _, (name, model) in itertools.product(range(rounds + 1), models.items()):
        begin = time.perf_counter()
        with torch.inference_mode():
            for _ in range(calls):
                model(*inputs)
        seconds[name].append((time.perf_counter() - begin) / calls)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first warms up


def _row(label: str, values: dict[str, float], name: str, baseline: str, unit: str, scale: float) -> dict:
    return {
        "name": label,
        "value": values[name] * scale,
        "unit": unit,
        "baseline": baseline,
        "baseline_value": values[baseline] * scale,
        "ratio": values[name] / values[baseline],
    }

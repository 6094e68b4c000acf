"""``scripts/bench latency``: what is timed, and the arithmetic of its rows."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from small_checkpoint import requests, small_checkpoint

from vla.runtime.engine import PolicyEngine

FILE = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "latency.py"


@pytest.fixture(scope="module")
def latency():
    spec = importlib.util.spec_from_file_location("latency_bench", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded():
    return small_checkpoint()


def test_every_stage_of_every_call_is_timed_and_no_hook_stays(latency, loaded):
    seconds = latency.time_policy(loaded, requests(1)[0], calls=3, warm_up=1)
    assert set(seconds) == {*latency.STAGES, "total"}
    assert all(len(values) == 3 and min(values) > 0 for values in seconds.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.policy.modules())


def test_compiled_parts_are_put_back(latency, loaded):
    before = loaded.act(*requests(1)[0])
    with latency.compiled_parts(loaded):
        assert "forward" in vars(loaded.policy.model.vision)
    for part in latency.PARTS.values():
        module = getattr(loaded.policy.model, part)
        assert module.forward.__func__ is type(module).forward
    assert (loaded.act(*requests(1)[0]) == before).all()


def test_the_floor_is_memory_or_compute_whichever_is_longer(latency, loaded):
    parameters = sum(p.numel() for p in loaded.policy.model.vision.parameters())
    slow_memory = latency.stage_floors(loaded, (2.0, math.inf))
    assert slow_memory["vision"] == 4 * parameters / 2.0
    slow_compute = latency.stage_floors(loaded, (math.inf, 1.0))
    parts = sum(slow_compute[stage] for stage in latency.PARTS)
    assert 0 < parts <= slow_compute["total"]


def test_rows_hold_median_p95_and_ratio_to_the_floor(latency):
    seconds = {"total": [n / 1000 for n in range(1, 102)]}
    (row,) = latency.stage_rows("nano eager", seconds, {"total": 0.017})
    assert row == {
        "name": "nano eager: total",
        "value": pytest.approx(51),
        "unit": "ms",
        "baseline": "floor",
        "baseline_value": pytest.approx(17),
        "ratio": pytest.approx(3),
        "p95": pytest.approx(96),
    }
    faster = latency.speed_up("x", {"total": [0.01]}, seconds)
    assert faster["value"] == faster["ratio"] == pytest.approx(5.1)


def test_a_preset_is_measured_eager_and_in_every_mode_without_the_compiler(latency, loaded, monkeypatch):
    monkeypatch.setattr(latency, "load_preset", lambda name, device: loaded)
    monkeypatch.setattr(latency, "modes_for", lambda device: ("fp32", "fp32_compiled"))
    monkeypatch.setattr(
        latency, "random_requests", lambda contract, count: requests(count)
    )  # images of the small checkpoint's own size
    rows = latency.measure_preset("small", torch.device("cpu"), (1e9, 1e9), 2, 1, compiled=False)
    names = [row["name"] for row in rows]
    assert names == [
        *(f"small eager: {stage}" for stage in (*latency.STAGES, "total")),
        "small runtime fp32: total",
        "small runtime fp32: speed-up over eager",
        "small runtime fp32: relative error of the actions",
    ]
    assert rows[-1]["value"] < 1e-5


def test_presets_are_made_without_a_network(latency):
    assert 6e6 < latency.memory_needed("nano") < 6e7
    loaded = latency.load_preset("nano", torch.device("cpu"))
    assert PolicyEngine(loaded, "fp32").mode == "fp32"
    for name in ("mergevla-0.5b", "cogvla-7b"):
        assert latency.memory_needed(name) > 6e9

"""The benchmark of batched experts compares ways that compute the same."""

import importlib
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return importlib.import_module("benchmarks.grouped_lora")


def test_every_way_computes_each_samples_own_expert(bench):
    ways = bench.make_ways(samples=5, experts=3, tokens=4, inputs=6, outputs=7, rank=2)
    want = ways["merged"]()
    assert want.shape == (5, 4, 7)
    for name in ("grouped", "loop"):
        torch.testing.assert_close(ways[name](), want)
    assert (ways["base"]() - want).abs().max() > 1e-2


def test_each_way_is_set_against_the_base_alone(bench):
    rows = bench.run(samples=4, experts=2, tokens=3, inputs=8, outputs=8, rank=2, calls=2)
    assert [row["name"].split(",")[0] for row in rows] == ["grouped", "loop", "merged"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["value"] / row["baseline_value"]) and row["value"] > 0


def test_the_median_is_over_the_calls_after_the_first_three(bench, monkeypatch):
    clock = iter([9.0] * 3 + [0.0, 1.0, 0.0, 2.0, 0.0, 5.0])  # the first three are not timed
    monkeypatch.setattr(bench, "_now", lambda: next(clock))
    assert bench.time_in_turns({"only": lambda: None}, calls=3) == {"only": 2.0}

"""The benchmark of even motion drives the same points in three ways."""

import importlib
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("benchmarks.motion")


def test_points_are_posted_at_the_rate_of_actions(bench):
    posted = list(bench.points(20.0, 0.2))
    assert [k for k, (_, point) in enumerate(posted) if point is not None] == [0, 5, 10, 15]
    assert posted[10][0] == 0.1 and np.array_equal(posted[10][1], bench.path(0.1))
    times = [time for time, point in bench.points(30.0, 10.0) if point is not None]
    assert times == pytest.approx(np.arange(300) / 30)


def test_what_shakes_and_what_is_late_is_seen(bench):
    times = bench.CYCLE * np.arange(1, 401)
    late = np.array([bench.path(t - 0.05) for t in times])
    assert bench.judge(late) == pytest.approx({"unrest": 0.0, "lag": 50.0}, abs=0.1)
    shaken = late + 1e-4 * np.sin(2 * np.pi * 10 * times)[:, None]
    assert bench.judge(shaken)["unrest"] == pytest.approx(1e-4 * (2 * np.pi * 10) ** 2 / np.sqrt(2), rel=0.05)


def test_an_arm_that_is_led_moves_more_evenly(bench):
    rows = bench.run(seconds=3.0, rates=(20.0,))
    ratio = {(row["name"].split()[0], row["baseline"]): row["ratio"] for row in rows}
    assert ratio["unrest", "steps"] < 0.7 and ratio["unrest", "straight to the servos"] < 0.2
    assert ratio["lag", "steps"] < 1.1

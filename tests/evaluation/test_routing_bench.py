"""``scripts/bench routing --evaluations``: success beside cost, from what `vla eval` wrote."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def write_evaluation(folder: Path, **suites: tuple[int, int]) -> Path:
    folder.mkdir()
    counts = {
        suite: {"successes": solved, "episodes": count, "rate": solved / count, "interval": [0.25, 0.75]}
        for suite, (solved, count) in suites.items()
    }
    (folder / "summary.json").write_text(json.dumps({"suites": counts}))
    return folder


def test_success_rows_compare_with_the_first_evaluation_on_common_suites(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks.routing import success

    dense = write_evaluation(tmp_path / "dense", libero_object=(16, 20))
    routed = write_evaluation(tmp_path / "routed", libero_object=(12, 20), libero_goal=(5, 20))
    first, second = success((f"dense={dense}", f"routed={routed}"))
    assert first["ratio"] == 1
    assert second == {
        "name": "libero_object, routed: 12 of 20 (25.0-75.0)",
        "value": 60.0,
        "unit": "%",
        "baseline": "dense",
        "baseline_value": 80.0,
        "ratio": 0.6 / 0.8,
    }


def test_an_unfinished_evaluation_is_a_sentence_before_anything_is_measured(tmp_path):
    command = [sys.executable, str(SCRIPTS / "bench"), "routing", "--evaluations", f"dense={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "there is no finished evaluation" in done.stderr and len(done.stderr.strip().splitlines()) == 1

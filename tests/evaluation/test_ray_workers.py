"""The worker function as Ray tasks, on a Ray that runs here."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from scripted_rollout import ScriptedSource, Simulate, Trouble

from vla.errors import UserError
from vla.evaluation.records import read_records
from vla.evaluation.run import evaluate_source

SOURCE = ScriptedSource()


def outcomes(folder):
    return {row.episode: (row.status, row.steps, row.queries) for row in read_records(folder)}


@pytest.fixture
def ray_config(eval_config, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed (extra `distributed`)")
    # Ray's workers get their import path from the environment, multiprocessing's from the parent.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return eval_config(ray="local")


@pytest.mark.slow
def test_ray_tasks_give_what_local_workers_give(ray_config, tmp_path):
    evaluate_source(ray_config, SOURCE, Simulate())
    local = replace(ray_config, ray=None, out=tmp_path / "local")
    evaluate_source(local, SOURCE, Simulate())
    assert outcomes(ray_config.out) == outcomes(local.out) and len(outcomes(local.out)) == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "error"), [("kill", "worker died"), ("raise", "SimulationError: the physics")]
)
def test_a_broken_ray_task_is_retried_and_says_so(ray_config, tmp_path, kind, error):
    notes = tmp_path / "notes"
    notes.mkdir()
    evaluate_source(ray_config, SOURCE, Simulate(Trouble(kind, init_state=2, times=1, notes=notes)))
    rows = read_records(ray_config.out)
    (retried,) = [row for row in rows if row.attempts == 2]
    assert error in retried.errors[0] and len(rows) == 12


@pytest.mark.slow
def test_a_refusal_in_a_ray_task_is_the_users_sentence(ray_config, tmp_path):
    with pytest.raises(UserError, match="The scripted simulator has no back-end"):
        evaluate_source(
            ray_config, SOURCE, Simulate(Trouble("refuse", init_state=0, times=9, notes=tmp_path))
        )


def test_without_ray_the_remedy_is_named(eval_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'lerobot_policy_cogmerge\[distributed\]'"):
        evaluate_source(eval_config(ray="local"), SOURCE, Simulate())

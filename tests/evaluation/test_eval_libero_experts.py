"""`vla eval` of a bank and of a masked merge from outside: spawned workers, the real simulator."""

import json
import subprocess
import sys

import pytest
import yaml
from tiny_skills import save_tiny_base, save_tiny_expert

from vla.evaluation.records import read_records
from vla.experts.bank_folder import BankFolder
from vla.experts.merge import merge
from vla.experts.recipe import load_recipe
from vla.sim.suites import load_suite

NAMES = ("soup", "cheese")


@pytest.fixture(scope="module")
def skills(tmp_path_factory):
    """By its card each of two experts knows one of the first two tasks of libero_object."""
    folder = tmp_path_factory.mktemp("skills")
    base = save_tiny_base(folder / "base")
    for task, name in enumerate(NAMES):
        save_tiny_expert(folder / name, base, task + 1, [load_suite("libero_object").task(task).language])
    BankFolder.create(folder / "bank", base, [folder / name for name in NAMES])
    recipe = {"version": 1, "base": "base", "experts": list(NAMES), "method": "ties", "lambda": 0.6}
    recipe |= {"private": ["model.action_decoder.*", "model.keyframe_head.*"]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merge(load_recipe(folder / "recipe.yaml"), folder / "merged")
    return folder


def evaluate(checkpoint, out, *options):
    command = [sys.executable, "-m", "vla.cli", "eval", "--checkpoint", str(checkpoint), "--out", str(out)]
    command += ["--tasks=1", "--init-states=0", "--workers=1", "--max-steps=10", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_bank_with_its_router_and_the_oracle(skills, tmp_path):
    printed = evaluate(skills / "bank", tmp_path, "--task-router=language")
    (routed,), (told,) = read_records(tmp_path / "language"), read_records(tmp_path / "oracle")
    assert (routed.task, routed.status, routed.steps, routed.queries) == (1, "failure", 10, 2)
    assert routed.route["truth"] == "cheese" == routed.route["decisions"][0]["acted"]
    assert told.route["adopted"] and told.steps == routed.steps
    summary = json.loads((tmp_path / "task_routing.json").read_text())
    assert summary["total"]["routing"]["accuracy"] == 1.0 and "confusion: who acted" in printed


@pytest.mark.slow
def test_a_masked_merge_as_its_expert_and_as_an_ordinary_checkpoint(skills, tmp_path):
    evaluate(skills / "merged", tmp_path / "masked")
    (told,) = read_records(tmp_path / "masked")
    assert told.status == "failure" and [d["acted"] for d in told.route["decisions"]] == ["cheese"]
    evaluate(skills / "merged", tmp_path / "plain", "--task-router=none")
    (plain,) = read_records(tmp_path / "plain")
    assert plain.steps == 10 and plain.route is None

"""`vla eval` of banks and merges, with real tiny networks in a scripted simulation."""

import json
import pickle
from dataclasses import replace

import pytest
import yaml
from scripted_rollout import SpokenSimulate, Trouble
from tiny_skills import SIZE, observation, save_tiny_base, save_tiny_expert

from vla import cli
from vla.errors import UserError
from vla.evaluation import run
from vla.evaluation.plan import PlannedTask
from vla.evaluation.policy_source import open_source
from vla.evaluation.records import read_records
from vla.evaluation.rollout import Request, RolloutJob, run_episodes
from vla.evaluation.run import EvalConfig, plan_of
from vla.evaluation.task_routed import ExpertsSource, Routing, TaskRoutedPolicy, holds_experts, right_experts
from vla.evaluation.task_routing import evaluate_experts
from vla.experts.bank_folder import BankFolder
from vla.experts.bank_policy import BankPolicy
from vla.experts.merge import merge
from vla.experts.recipe import load_recipe
from vla.experts.task_routers.router import Decision
from vla.sim.suites import load_suite

NAMES = ("soup", "cheese")


@pytest.fixture(scope="module")
def skills(tmp_path_factory):
    """Two experts; by its card each knows one of the first two tasks of libero_object."""
    folder = tmp_path_factory.mktemp("skills")
    base = save_tiny_base(folder / "base")
    tasks = [load_suite("libero_object").task(i).language for i in range(2)]
    for seed, (name, task) in enumerate(zip(NAMES, tasks, strict=True), 1):
        save_tiny_expert(folder / name, base, seed, [task])
    BankFolder.create(folder / "bank", base, [folder / name for name in NAMES])
    recipe = {"version": 1, "base": "base", "experts": list(NAMES), "method": "ties", "lambda": 0.6}
    recipe |= {"private": ["model.action_decoder.*", "model.keyframe_head.*"]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merge(load_recipe(folder / "recipe.yaml"), folder / "merged")
    return folder


def configure(skills, out, checkpoint="bank", **options):
    small = {"tasks": "0,1", "init_states": "0-2", "max_steps": 24, "workers": 1}
    return EvalConfig(checkpoint=skills / checkpoint, out=out, **small | options)


def outcomes(folder):
    return {r.episode: (r.status, r.steps, r.queries) for r in read_records(folder)}


class InThisProcess:
    """A back-end without worker processes, whose start would be most of the test's time."""

    def __init__(self, config, job):
        self.job = job

    def run(self, queue):
        yield from run_episodes(self.job, iter(queue.take, None))


def test_router_beside_oracle(skills, tmp_path, monkeypatch):
    """One task is given to the wrong expert: what the router got right is taken over, the rest is run."""
    monkeypatch.setattr(run, "_backend", InThisProcess)
    swapped = ("libero_object:0=cheese",)  # by the cards it is soup, and language says soup
    config = configure(skills, tmp_path / "out", task_router="language", task_experts=swapped)
    summary = evaluate_experts(config, SpokenSimulate())
    assert summary["total"]["routing"]["confusion"] == [[0, 0], [3, 3]]
    assert [row["routing"]["accuracy"] for row in summary["tasks"]] == [0.0, 1.0]
    assert [row["expert"] for row in summary["tasks"]] == ["cheese", "cheese"]
    assert json.loads((tmp_path / "out/task_routing.json").read_text()) == summary
    oracle = read_records(tmp_path / "out/oracle")
    assert {r.task for r in oracle if r.route.get("adopted")} == {1}
    assert {d["acted"] for r in oracle if r.task == 0 for d in r.route["decisions"]} == {"cheese"}
    alone = configure(skills, tmp_path / "alone", task_experts=swapped)
    evaluate_experts(alone, SpokenSimulate())
    assert outcomes(tmp_path / "alone") == outcomes(tmp_path / "out/oracle"), "taken over or run, the same"
    before = outcomes(tmp_path / "out/oracle")
    evaluate_experts(replace(config, resume=True), SpokenSimulate(Trouble("refuse", 0, notes=tmp_path)))
    assert outcomes(tmp_path / "out/oracle") == before, "a finished evaluation runs nothing again"


def test_a_bank_that_changes_is_another_checkpoint(skills, tmp_path):
    truths = {("libero_object", 0): "soup"}
    bank = BankFolder.create(tmp_path / "bank", skills / "base", [skills / "soup"])
    source = ExpertsSource.open(tmp_path / "bank", Routing(), truths)
    assert pickle.loads(pickle.dumps(source)) == source
    assert source.hash != ExpertsSource.open(tmp_path / "bank", Routing("language"), truths).hash
    assert source.contract.interface.cameras[0].height == SIZE
    bank.add(skills / "cheese")
    with pytest.raises(UserError, match="changed during the evaluation"):
        source.load()
    weights = skills / "merged/experts/soup/mask.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"mask\.safetensors is not what the merge wrote"):
        ExpertsSource.open(skills / "merged", Routing())
    weights.write_bytes(content)


class ScriptedRouter:
    """Says what it is told, one decision per call."""

    def __init__(self, decisions):
        self.decisions, self.asked = list(decisions), 0

    def route(self, seen, truth=None):
        self.asked += 1
        expert, abstained = self.decisions.pop(0)
        return Decision(expert, (0.0, 0.0), 0.1, abstained)


def test_rerouting_and_abstention(skills):
    """An abstention in mid-episode keeps the expert in charge; one at the start lets the best guess act."""
    bank = BankPolicy.load(skills / "bank")
    router = ScriptedRouter([(0, True), (1, True), (1, False)])
    policy = TaskRoutedPolicy(bank, router, every=2, truths={("libero_object", 0): "soup"})
    policy.reset(0)
    policy.begin("libero_object", 0)
    given = observation(4)
    chunks = [policy.act(given.images, given.state, given.instruction) for _ in range(5)]
    alone = [bank.act([given], [expert])[0] for expert in (0, 1)]
    acted = [[(chunk == own).all() for own in alone].index(True) for chunk in chunks]
    assert acted == [0, 0, 0, 0, 1] and router.asked == 3
    decisions = policy.route["decisions"]
    assert [(d["query"], d["guess"], d["acted"]) for d in decisions] == [
        (0, "soup", "soup"),
        (2, "cheese", "soup"),
        (4, "cheese", "cheese"),
    ]
    once = TaskRoutedPolicy(bank, ScriptedRouter([(1, False), (0, False)]))
    for _ in range(3):
        once.act(given.images, given.state, given.instruction)
    assert len(once.route["decisions"]) == 1
    once.reset(1)
    assert once.route == {"truth": None, "decisions": []}


def test_right_experts():
    tasks = [
        PlannedTask("a", 0, "t0", "open it"),
        PlannedTask("a", 1, "t1", "close it"),
        PlannedTask("b", 0, "t", "x"),
    ]
    known = {"opener": ("open it",), "closer": ("close it", "shut it")}
    named = ("b=closer", "b:0=opener")
    assert right_experts(tasks, known, named) == {("a", 0): "opener", ("a", 1): "closer", ("b", 0): "opener"}
    with pytest.raises(
        UserError, match=r"right for 'x' \(b task 0\)\? no expert's card .*--task-experts b:0="
    ):
        right_experts(tasks, known)
    with pytest.raises(UserError, match="opener and closer were trained on it"):
        right_experts(tasks[:1], known | {"closer": ("open it",)})
    with pytest.raises(UserError, match="Did you mean 'opener'"):
        right_experts(tasks, known, ("b=openr",))
    with pytest.raises(UserError, match="is malformed"):
        right_experts(tasks, known, ("opener",))


def test_the_command(skills, tmp_path, capsys):
    assert holds_experts(skills / "bank") and holds_experts(skills / "merged")
    assert not holds_experts(skills / "base") and not holds_experts(skills / "soup")
    out = ["--out", str(tmp_path / "out")]
    assert cli.run(["eval", "--checkpoint", str(skills / "base"), "--task-router", "language", *out]) == 2
    assert "is neither a bank nor a merge" in capsys.readouterr().err
    assert cli.run(["eval", "--checkpoint", str(skills / "bank"), "--tasks", "5", *out]) == 2
    assert "say so with --task-experts libero_object:5=EXPERT" in " ".join(capsys.readouterr().err.split())
    assert cli.run(["eval", "--checkpoint", str(skills / "bank"), "--task-router", "langage", *out]) == 2
    assert "no task router 'langage'" in capsys.readouterr().err


def test_a_merge_with_its_masks(skills, tmp_path):
    """In this process: each task has its expert; as an ordinary checkpoint a merge has no route."""
    truths = {("libero_object", 0): "cheese", ("libero_object", 1): "cheese"}
    config = configure(skills, tmp_path, "merged")

    def rollout(source):
        job = RolloutJob(source, plan_of(config, source), SpokenSimulate())
        return [outcome.record for outcome in run_episodes(job, map(Request, job.plan.episodes))]

    told = rollout(ExpertsSource.open(skills / "merged", Routing("oracle"), truths))
    heard = rollout(ExpertsSource.open(skills / "merged", Routing("language", every=2), truths))
    assert [d["acted"] for r in told for d in r.route["decisions"]] == ["cheese"] * 6
    assert [{d["acted"] for d in r.route["decisions"]} for r in heard] == [{"soup"}] * 3 + [{"cheese"}] * 3
    assert [len(r.route["decisions"]) for r in heard] == [-(-r.queries // 2) for r in heard]

    def episodes(records):
        return [(r.status, r.steps, r.queries) for r in records]

    assert episodes(told)[3:] == episodes(heard)[3:]  # the same expert, told or heard
    assert all(record.route is None for record in rollout(open_source(skills / "merged")))

"""Chunk schedulers inside an episode, with scripted policy and simulation."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scripted_rollout import CHUNK, ScriptedSimulation, ScriptedSource, Trouble

from vla.evaluation.plan import PLAN_FILE, Plan, make_plan
from vla.evaluation.rollout import Request, RolloutJob, run_episode
from vla.evaluation.run import EvalConfig, _action_steps
from vla.runtime.chunk_scheduling import SCHEDULERS

SOURCE = ScriptedSource(skill=0.2)
LIMIT = 50


class Recorder(ScriptedSimulation):
    """Writes down what it is told to do."""

    def __init__(self):
        super().__init__("libero_object", 0, 32, Trouble())
        self.actions = []

    def step(self, action):
        self.actions.append(action.copy())
        return super().step(action)


def plan(**changes):
    made = make_plan(
        suites=("libero_object",),
        tasks="0",
        init_states="0",
        episodes_per_task=None,
        seed=0,
        protocol="oft",
        max_steps=LIMIT,
        checkpoint_hash=SOURCE.hash,
        n_action_steps=CHUNK,
        image_size=32,
    )
    return replace(made, **changes)


def episode(plan):
    simulation = Recorder()
    outcome = run_episode(
        RolloutJob(SOURCE, plan), SOURCE.load(), simulation, Request(plan.episodes[0], trace=True)
    )
    return outcome, simulation


@pytest.mark.parametrize("n_action_steps", [1, 3, 8])
def test_the_default_executes_each_chunk_as_the_policy_gave_it(n_action_steps):
    outcome, simulation = episode(plan(n_action_steps=n_action_steps))
    policy, world = SOURCE.load(), Recorder()
    first = plan().episodes[0]
    policy.reset(first.seed)
    world.reset(first, 10)
    success = False
    while len(world.actions) < LIMIT and not success:
        chunk = policy.act(world.images(), world.state(), world.language)
        for action in np.clip(np.asarray(chunk, np.float64)[:n_action_steps], -1, 1):
            if len(world.actions) < LIMIT and not success:
                success = world.step(action)
    assert np.array_equal(simulation.actions, world.actions)  # bit for bit
    assert (outcome.record.success, outcome.record.steps) == (success, len(world.actions))
    assert outcome.trace is not None


def stands(actions):
    """Which of `actions` are no motion."""
    return [not action[:6].any() for action in actions]


def test_with_delay_the_arm_waits_for_every_chunk_or_goes_on_with_the_old_one():
    _, waiting = episode(plan(policy_delay=3))
    period = [True] * 3 + [False] * CHUNK
    assert stands(waiting.actions) == (period * 9)[: len(waiting.actions)]
    gripper = [action[6] for action in waiting.actions]
    assert gripper[:3] == [-1] * 3 and gripper[CHUNK + 3] == gripper[CHUNK + 2] == SOURCE.skill
    for name in ("receding_horizon", "temporal_ensembling", "real_time"):
        outcome, going = episode(plan(policy_delay=3, scheduler=name, n_action_steps=4))
        assert stands(going.actions) == [True] * 3 + [False] * (len(going.actions) - 3)
        assert outcome.record.queries == 1 + -(-(len(going.actions) - 3 - 4) // 4)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_an_episode_repeats_under_every_scheduler(name):
    runs = [episode(plan(policy_delay=2, scheduler=name, n_action_steps=4))[1].actions for _ in range(2)]
    assert np.array_equal(*runs)
    assert np.abs(runs[0]).max() <= 1


def test_actions_per_query_follow_the_scheduler_unless_given():
    contract = replace(SOURCE.contract, n_action_steps=5)
    chosen = {name: _action_steps(EvalConfig(scheduler=name), contract) for name in SCHEDULERS}
    assert chosen == {
        "execute_all": 5,
        "receding_horizon": CHUNK // 2,
        "temporal_ensembling": 1,
        "real_time": CHUNK // 2,
    }
    assert _action_steps(EvalConfig(scheduler="real_time", n_action_steps=7), contract) == 7


def test_plans_remember_the_scheduler_and_those_of_the_first_release_had_one(tmp_path):
    changed = plan(scheduler="real_time", policy_delay=2)
    changed.save(tmp_path)
    assert Plan.load(tmp_path) == changed and changed.hash == plan().hash
    content = json.loads((tmp_path / PLAN_FILE).read_text())
    del content["scheduler"], content["policy_delay"]
    (tmp_path / PLAN_FILE).write_text(json.dumps(content))
    assert Plan.load(tmp_path) == plan()

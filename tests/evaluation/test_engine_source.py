"""A checkpoint through the runtime engine, as an evaluation asks it."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from scripted_rollout import ScriptedSource
from untrained_checkpoint import save_untrained_nano

from vla.errors import UserError
from vla.evaluation.engine_source import EngineSource
from vla.evaluation.plan import Plan, make_plan
from vla.evaluation.policy_source import CheckpointSource, RoutedPolicy
from vla.evaluation.run import EvalConfig, evaluate


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return CheckpointSource.open(save_untrained_nano(tmp_path_factory.mktemp("nano") / "policy"))


def test_the_engine_acts_as_the_checkpoint_does_in_a_worker_of_its_own(source):
    engine = pickle.loads(pickle.dumps(EngineSource.of(source, "fp32")))
    assert engine.hash == source.hash and engine.contract == source.contract
    assert engine.label == f"{source.label}, engine fp32"
    policy, plain = engine.load(), source.load()
    policy.reset(0)
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (128, 128, 3), dtype=np.uint8)
    observation = {"image": image, "image2": image[::-1]}, np.zeros(8, np.float32), "open the drawer"
    np.testing.assert_allclose(policy.act(*observation), plain.act(*observation), atol=2e-5)
    assert isinstance(policy, RoutedPolicy)
    chunk, report = policy.act_with_report(*observation)
    assert np.array_equal(chunk, policy.act(*observation))
    _, expected = plain.act_with_report(*observation)
    assert all(np.array_equal(report.kept[layer], kept) for layer, kept in expected.kept.items())


@pytest.mark.parametrize("mode", ["auto", "fp8"])
def test_a_mode_that_does_not_exist_is_refused_before_anything_runs(tmp_path, source, mode):
    config = EvalConfig(checkpoint=source.path, engine=mode, out=tmp_path / "out")
    with pytest.raises(UserError, match=f"no mode '{mode}' on cpu"):
        evaluate(config)
    assert not config.out.exists()


def test_only_checkpoints_go_through_the_engine():
    with pytest.raises(UserError, match="not experts, banks or merges"):
        EngineSource.of(ScriptedSource(), "fp32")


def test_the_plan_says_which_engine_answered(tmp_path):
    plan = make_plan(
        suites=("libero_object",),
        tasks="0",
        init_states="0",
        episodes_per_task=None,
        seed=0,
        protocol="oft",
        max_steps=None,
        checkpoint_hash="c" * 64,
        n_action_steps=8,
        image_size=128,
        engine="int8",
    )
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    assert plan.differences(replace(plan, engine=None)) == ["engine int8 against None"]

"""`vla run` with several experts: the task says who acts, and who cannot be told does not move an arm."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from arm_bench import HEIGHT, WIDTH, arm_contract, save_arm_expert, save_untrained_arm_policy

from vla.errors import UserError
from vla.experts.bank_folder import BankFolder
from vla.experts.expert_policy import load_expert_policy
from vla.experts.merge import merge
from vla.experts.recipe import load_recipe
from vla.policy.checkpoint import load_checkpoint
from vla.robot_drivers.so101.calibration import JOINTS, JointCalibration
from vla.runtime.robot.policy_source import open_policy
from vla.serving.experts import ExpertChoice

CALIBRATION = {name: JointCalibration(id, 0, 0, 1000, 3000) for id, name in enumerate(JOINTS, 1)}
TAUGHT = {"place": ("put the cube in the bowl",), "wave": ("wave your hand", "say hello")}


@pytest.fixture(scope="module")
def skills(tmp_path_factory) -> Path:
    """A base, two experts, a bank and a merge of them."""
    folder = tmp_path_factory.mktemp("skills")
    base = save_untrained_arm_policy(folder / "base", arm_contract(CALIBRATION))
    experts = [
        save_arm_expert(folder / name, base, seed, taught, shift=2.0 * seed)
        for seed, (name, taught) in enumerate(TAUGHT.items(), 1)
    ]
    BankFolder.create(folder / "bank", base, experts)
    recipe = {"version": 1, "base": str(base), "experts": list(map(str, experts)), "lambda": 0.5}
    (folder / "merge.yaml").write_text(yaml.safe_dump(recipe | {"method": "task_arithmetic"}))
    merge(load_recipe(folder / "merge.yaml"), folder / "merge")
    return folder


def seen(seed: int = 0):
    generator = np.random.default_rng(seed)
    images = {
        f"observation.images.{name}": generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        for name in ("top", "wrist")
    }
    return images, generator.normal(size=6).astype(np.float32)


def opened(folder: Path, task: str, engine: str | None = None, **choice):
    return open_policy(folder, None, None, "cpu", engine, ExpertChoice(**choice), task)


@pytest.mark.parametrize("task", ["put the cube in the bowl", "say hello"])
def test_the_task_chooses_the_expert_of_a_bank(skills, task):
    name = "place" if "cube" in task else "wave"
    alone = load_expert_policy(skills / "base", skills / name)
    with opened(skills / "bank", task) as policy:
        choice = policy.identity["choice"]
        assert choice["expert"] == name and choice["by"] == "language" and choice["margin"] > 0.05
        assert policy.expert.sentence.startswith(f"'{name}' acts (language, ")
        assert policy.contract.statistics["action"] == alone.contract.statistics["action"]
        policy.reset(0)
        for seed in (0, 1):
            images, state = seen(seed)
            np.testing.assert_allclose(
                policy.act(images, state, task), alone.act(images, state, task), atol=2e-4
            )


def test_a_name_overrules_the_task_and_a_merge_acts_as_its_task(skills):
    images, state = seen()
    chunks = {}
    for name in TAUGHT:
        with opened(skills / "merge", "say hello", expert=name) as policy:
            assert policy.identity["choice"] == {"expert": name, "by": "--expert"}
            chunks[name] = policy.act(images, state, "say hello")
    with opened(skills / "merge", "say hello") as policy:
        assert policy.identity["choice"]["expert"] == "wave"
        np.testing.assert_array_equal(policy.act(images, state, "say hello"), chunks["wave"])
    assert np.abs(chunks["wave"] - chunks["place"]).max() > 0.5  # each has its own statistics
    with opened(skills / "merge", "say hello", router="none") as policy:
        assert policy.expert is None and "choice" not in policy.identity
        plain = load_checkpoint(skills / "merge").act(images, state, "say hello")
        np.testing.assert_array_equal(policy.act(images, state, "say hello"), plain)


@pytest.mark.parametrize("kind", ["bank", "merge"])
def test_a_named_expert_runs_in_the_engine(skills, kind):
    images, state = seen()
    chunks = []
    for engine in (None, "fp32"):
        with opened(skills / kind, "say hello", engine, expert="place") as policy:
            assert policy.expert.sentence == "'place' acts (--expert)"
            chunks.append(policy.act(images, state, "say hello"))
    np.testing.assert_allclose(*chunks, atol=2e-3)  # degrees


def test_a_router_that_looks_chooses_at_the_first_observation_and_once(skills):
    with opened(skills / "bank", "anything", router="value_subspace", margin=0.0) as policy:
        assert policy.identity["choice"] == {} and policy.expert.sentence == "not chosen yet"
        policy.act(*seen(0), "anything")
        chosen = policy.identity["choice"]["expert"]  # the same dictionary: a record sees it
        assert policy.identity["choice"]["by"] == "value_subspace"
        policy.reset(1)
        for seed in range(1, 5):
            policy.act(*seen(seed), "anything")
            assert policy.identity["choice"]["expert"] == chosen


def test_who_cannot_be_told_is_a_sentence(skills):
    with (
        pytest.raises(UserError, match=r"cannot tell whether '(place|wave)' or '(place|wave)'.*--expert"),
        opened(skills / "bank", "put the cube in the bowl", margin=2.5),
    ):
        pass
    with opened(skills / "bank", "anything", router="value_subspace", margin=1e9) as policy:
        with pytest.raises(UserError, match=r"'value_subspace' cannot tell.*'say hello'"):
            policy.act(*seen(), "anything")
        assert policy.identity["choice"] == {}


@pytest.mark.parametrize(
    ("folder", "choice", "words"),
    [
        ("bank", {"expert": "plce"}, "no expert 'plce'. Did you mean 'place'"),
        ("bank", {"router": "langage"}, "Did you mean 'language'"),
        ("bank", {"router": "oracle"}, "name the one with --expert"),
        ("bank", {"expert": "place", "router": "language"}, "either --expert or --task-router"),
        ("bank", {"router": "none"}, "is not a checkpoint"),
        ("bank", {"engine": "auto"}, "name the expert that acts with --expert"),
        ("base", {"expert": "place"}, "neither a bank nor a merge"),
        ("base", {"margin": 0.1}, "neither a bank nor a merge"),
    ],
)
def test_what_cannot_be_chosen_is_a_sentence(skills, folder, choice, words):
    with pytest.raises(UserError, match=words), opened(skills / folder, "say hello", **choice):
        pass

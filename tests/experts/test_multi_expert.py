"""Banks and merges as policies: every row is its own expert's answer, statistics included."""

import numpy as np
import pytest
import torch
import yaml
from tiny_skills import observation, save_tiny_base, save_tiny_expert

from vla.contract import PolicyContract
from vla.errors import UserError
from vla.experts.bank_folder import BankFolder
from vla.experts.bank_policy import BankPolicy
from vla.experts.expert_policy import load_expert_policy
from vla.experts.merge import merge
from vla.experts.merged import MergedCheckpoint
from vla.experts.merged_policy import MergedPolicy
from vla.experts.recipe import load_recipe
from vla.policy.checkpoint import load_checkpoint

NAMES = ("soup", "drawer", "stove")
#: Of actions of size 3 in float32: in which order sums are taken depends on the batch and on the CPU.
ROUNDING = 1e-4


def make_bank(skills, folder, names=NAMES):
    BankFolder.create(folder, skills / "base", [skills / name for name in names])
    return folder


def make_merge(skills, folder, **entries):
    recipe = {"version": 1, "base": str(skills / "base"), "experts": [str(skills / name) for name in NAMES]}
    recipe |= {
        "method": "task_arithmetic",
        "lambda": 0.6,
        "private": ["model.action_decoder.*", "*keyframe*"],
    }
    folder.with_suffix(".yaml").write_text(yaml.safe_dump(recipe | entries))
    merge(load_recipe(folder.with_suffix(".yaml")), folder)
    return folder


def test_a_batch_of_different_experts_equals_the_experts(skills, tmp_path):
    """Against each expert folded into a policy of its own; instructions may differ in length."""
    bank = BankPolicy.load(make_bank(skills, tmp_path / "bank"))
    seen = [observation(0, "turn on the stove"), observation(1), observation(2, "open it"), observation(3)]
    order = [2, 0, 1, 0]
    together = bank.act(seen, order)
    for given, expert, chunk in zip(seen, order, together, strict=True):
        alone = load_expert_policy(skills / "base", skills / NAMES[expert])
        expected = alone.act(given.images, given.state, given.instruction)
        np.testing.assert_allclose(chunk, expected, atol=ROUNDING)
        assert np.abs(expected - bank.act([given], [(expert + 1) % 3])[0]).max() > 0.05
    base = load_checkpoint(skills / "base").policy
    with torch.no_grad():
        batch = bank.batch(seen, None)
        assert torch.equal(bank.forward(batch, None), base.predict_action_chunk(batch))


def test_experts_of_a_cross_attention_decoder(tmp_path):
    """Its action queries are read from every layer and are each expert's own."""
    base = save_tiny_base(tmp_path / "base", action_decoder="cross_attention")
    for seed, name in enumerate(("a", "b"), 1):
        save_tiny_expert(tmp_path / name, base, seed)
    bank = BankPolicy.load(make_bank(tmp_path, tmp_path / "bank", ("a", "b")))
    chunks = bank.act([observation(5), observation(6)], [1, 0])
    for seed, name, chunk in ((5, "b", chunks[0]), (6, "a", chunks[1])):
        alone, given = load_expert_policy(base, tmp_path / name), observation(seed)
        expected = alone.act(given.images, given.state, given.instruction)
        np.testing.assert_allclose(chunk, expected, atol=ROUNDING)


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"rescale": True},
        {"method": "emr", "lambda": None},
        {"method": "least_squares", "lambda": None, "options": {"bits": 2}, "rescale": True},
    ],
    ids=["masks", "rescaled", "emr", "two bits"],
)
def test_a_merge_switches_to_each_tasks_weights(skills, tmp_path, entries):
    """Against the weights read from disk, bit for bit, in any order of switches."""
    folder = make_merge(skills, tmp_path / "merged", **entries)
    policy, on_disk = MergedPolicy.load(folder), MergedCheckpoint.open(folder)
    live = policy.policy.state_dict()
    places = {name: value.data_ptr() for name, value in live.items()}
    merged = {name: value.clone() for name, value in live.items()}
    for expert in (1, 0, 2, 0):
        policy.live.switch(expert)
        for name, value in (merged | dict(on_disk.task_weights(NAMES[expert]))).items():
            assert torch.equal(live[name], value), name
    assert {name: value.data_ptr() for name, value in policy.policy.state_dict().items()} == places
    own = PolicyContract.load(skills / "stove").statistics["action"]["max"]
    assert policy.faces[2].contract.statistics["action"]["max"] == own


def test_rows_of_a_merge(skills, tmp_path):
    policy = MergedPolicy.load(make_merge(skills, tmp_path / "merged"))
    seen = [observation(i) for i in range(4)]
    together = policy.act(seen, [2, 0, 2, 1])
    for i, expert in enumerate((2, 0, 2, 1)):
        np.testing.assert_allclose(together[i], policy.act([seen[i]], [expert])[0], atol=1e-5)


def test_a_merge_finds_back_to_the_base(skills, tmp_path):
    """What the probe reads is the same in a bank and in a merge, whatever was switched before."""
    override = {"overrides": {"model.vision.*": {"lambda": None}}}
    merged = MergedPolicy.load(make_merge(skills, tmp_path / "merged", **override))
    bank = BankPolicy.load(make_bank(skills, tmp_path / "bank"))
    given = observation(7)
    before = merged.act([given], [1])[0]
    assert torch.equal(merged.base_features(given), bank.base_features(given))
    np.testing.assert_array_equal(merged.act([given], [1])[0], before)
    assert torch.equal(merged.base_features(observation(8)), bank.base_features(observation(8)))
    assert not torch.equal(bank.base_features(given), bank.base_features(observation(8)))


def test_a_merge_of_experts_that_speak_otherwise_is_refused(skills, tmp_path):
    folder = make_merge(skills, tmp_path / "merged")
    path = folder / "experts/stove/contract.json"
    path.write_text(path.read_text().replace('"control_rate": 20.0', '"control_rate": 10.0'))
    with pytest.raises(UserError, match="'stove' differs from its base in interface"):
        MergedPolicy.load(folder)


def test_an_empty_bank_does_not_act(skills, tmp_path):
    with pytest.raises(UserError, match="is empty; `vla bank add`"):
        BankPolicy.load(make_bank(skills, tmp_path / "bank", ()))

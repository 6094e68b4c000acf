"""Experts with whole heads of their own on a cross-attention base: in a bank, and merged by `head_parts`."""

import json
from fnmatch import fnmatchcase

import pytest
import torch
from tiny_skills import observation, save_tiny_base, save_tiny_expert

from vla.experts.bank import ExpertBank
from vla.experts.expert_policy import load_expert_policy
from vla.experts.lora_expert import LoraExpert
from vla.experts.merge import merge
from vla.experts.merged import MergedCheckpoint
from vla.experts.recipe import load_recipe
from vla.policy.checkpoint import load_checkpoint
from vla.policy.head import head_parts

HEAD = ("model.action_decoder", "model.state_projector", "model.keyframe_head")


@pytest.fixture(scope="module")
def skills(tmp_path_factory):
    """A folder with a base and two experts that trained every part of its head in full."""
    folder = tmp_path_factory.mktemp("skills")
    base = save_tiny_base(folder / "base", action_decoder="cross_attention", action_queries=3)
    for seed, name in ((1, "pick"), (2, "push")):
        save_tiny_expert(folder / name, base, seed, full=HEAD)
    return folder


def test_a_bank_runs_every_row_through_its_own_action_expert(skills):
    loaded, seen = load_checkpoint(skills / "base"), observation()
    one = loaded.preprocessor(loaded.batch(seen.images, seen.state, seen.instruction))
    batch = one | {key: value.repeat_interleave(3, 0) for key, value in one.items() if torch.is_tensor(value)}
    bank = ExpertBank(loaded.policy)
    for name in ("pick", "push"):
        bank.add(LoraExpert.load(skills / name))
    with torch.no_grad(), bank.rows([1, 0, 1]):
        together = loaded.policy.predict(batch)
    assert (together.actions[0] - together.actions[1]).abs().max() > 0.1
    torch.testing.assert_close(together.actions[0], together.actions[2], atol=1e-4, rtol=1e-4)
    for row, name in ((0, "push"), (1, "pick")):
        alone = load_expert_policy(skills / "base", skills / name).policy.eval()
        with torch.no_grad():
            expected = alone.predict(one)
        torch.testing.assert_close(together.actions[row], expected.actions[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.keyframe[row], expected.keyframe[0], atol=1e-4, rtol=1e-4)


def test_a_merge_averages_the_shared_parts_and_keeps_the_private_ones(skills):
    parts = head_parts(load_checkpoint(skills / "base").policy)
    recipe = {"version": 1, "base": "base", "experts": ["pick", "push"], "method": "task_arithmetic"}
    recipe |= {"shared": list(parts.shared), "private": list(parts.private)}
    (skills / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    merge(load_recipe(skills / "recipe.yaml"), skills / "merged")
    merged = MergedCheckpoint.open(skills / "merged")
    weights = dict(load_checkpoint(skills / "merged").policy.named_parameters())
    experts = {name: LoraExpert.load(skills / name).tensors for name in merged.experts}
    own = {name: dict(merged.task_weights(name)) for name in merged.experts}
    head = [n for n in weights if n.startswith(tuple(f"{part}." for part in HEAD))]
    kept = [n for n in head if any(fnmatchcase(n, glob) for glob in parts.private)]
    assert 0 < len(kept) < len(head) and "model.action_decoder.blocks.2.gate" in kept
    for name in head:
        if name in kept:
            assert all(torch.equal(own[expert][name], experts[expert][name]) for expert in experts)
        else:
            mean = (experts["pick"][name] + experts["push"][name]) / 2
            torch.testing.assert_close(weights[name], mean)
            assert name not in own["pick"]

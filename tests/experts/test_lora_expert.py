"""Experts are PEFT adapters: what PEFT writes is read exactly, and what is written PEFT reads."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from vla.contract import Interface, PolicyContract, Vector
from vla.errors import UserError
from vla.experts.lora_expert import ExpertCard, LoraExpert, base_hash, declare, make_config
from vla.experts.low_rank import LowRank, stack

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 3},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 5, "up_proj": 1},
    },
    "rslora with patterns": {
        "use_rslora": True,
        "rank_pattern": {"o_proj": 8},
        "alpha_pattern": {"o_proj": 3},
    },
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_updates_are_what_peft_adds_to_the_weights(save_adapter, options):
    folder, model = save_adapter(**options)
    expert = LoraExpert.load(folder)
    layers = {name: m for name, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert set(expert.modules) == set(layers)
    for name, layer in layers.items():
        torch.testing.assert_close(expert.update(name).dense(), layer.get_delta_weight("default"))


def test_round_trip_through_peft(save_adapter, make_model, tmp_path):
    """Read PEFT's folder, write it, load it with PEFT: the model answers the same to the last bit."""
    folder, model = save_adapter(**VARIANTS["rslora with patterns"], modules_to_save=["norm"])
    expert = LoraExpert.load(folder)
    assert "model.norm.weight" in expert.full_tensors
    written = expert.save(tmp_path / "written")
    again = PeftModel.from_pretrained(make_model(), written).eval()
    tokens = torch.arange(6)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    first, second = (
        load_file(folder / "adapter_model.safetensors"),
        load_file(written / "adapter_model.safetensors"),
    )
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_our_own_adapter_loads_in_peft(make_model, tmp_path):
    """Ranks differ per layer; α/√r follows each layer's own."""
    ranks = {f"model.layers.{i}.self_attn.q_proj": 2 + i for i in range(2)} | {"lm_head": 4}
    shapes = {"lm_head": (32, 16)}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, rank in ranks.items():
        m, n = shapes.get(module, (16, 16))
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, n, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(m, rank, generator=generator)
    expert = LoraExpert(make_config(ranks, alpha=6, rslora=True), tensors)
    model = PeftModel.from_pretrained(make_model(), expert.save(tmp_path / "ours"))
    for module in ranks:
        layer = model.base_model.model.get_submodule(module)
        torch.testing.assert_close(expert.update(module).dense(), layer.get_delta_weight("default"))
    assert expert.scale("lm_head") == 6 / 2


def test_factors_are_float32_whatever_was_stored(save_adapter, tmp_path):
    folder, _ = save_adapter()
    path = folder / "adapter_model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path)
    expert = LoraExpert.load(folder)
    assert {expert.update(m).b.dtype for m in expert.modules} == {torch.float32}
    written = load_file(expert.save(tmp_path / "written") / "adapter_model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.float32}


def test_an_expert_is_refused_on_another_base(save_adapter, save_base):
    folder, base = save_adapter()[0], save_base()
    with pytest.raises(UserError, match="does not say which base"):
        LoraExpert.load(folder).require_base(base_hash(base), base)
    declare(folder, "pick", base, head_seed=7)
    expert = LoraExpert.load(folder)
    assert expert.card == ExpertCard("pick", base_hash(base), 7)
    expert.require_base(base_hash(base), base)
    other = save_base("other", torch.bfloat16)
    with pytest.raises(UserError, match=r"'pick'.*was trained on base"):
        expert.require_base(base_hash(other), other)


def test_card_and_statistics_travel_with_the_expert(save_adapter, save_base, tmp_path):
    folder = save_adapter()[0]
    card = declare(folder, "pick", save_base())
    action = Vector("action", ("x", "y"))
    contract = PolicyContract(
        Interface((), None, action, None, 10.0), 4, 4, {}, {"action": {"mean": [0.0, 1.0]}}
    )
    contract.save(folder)
    again = LoraExpert.load(LoraExpert.load(folder).save(tmp_path / "copy"))
    assert (again.card, again.contract) == (card, contract)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_dora": True}, "not plain LoRA.*use_dora"),
        ({"some_future_variant": {"x": 1}}, "some_future_variant"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"r": 5}, "rank 5, its factors have shapes"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"alpha_pattern": {"(": 3}}, "malformed pattern"),
    ],
)
def test_foreign_algebra_is_refused(save_adapter, edit_json, changes, sentence):
    folder, _ = save_adapter()
    edit_json(folder / "adapter_config.json", **changes)
    with pytest.raises(UserError, match=sentence):
        expert = LoraExpert.load(folder)
        expert.update(expert.modules[0])


def test_damage_is_refused(save_adapter, save_base, edit_json):
    folder, _ = save_adapter()
    path = folder / "adapter_model.safetensors"
    whole = load_file(path)
    module = "model.layers.0.mlp.up_proj"
    left = f"base_model.model.{module}.lora_B.weight"
    save_file({name: value for name, value in whole.items() if name != left}, path)
    with pytest.raises(UserError, match="only one of the two factors"):
        LoraExpert.load(folder)
    save_file(whole | {left: whole[left] * torch.nan}, path)
    with pytest.raises(UserError, match="not finite"):
        LoraExpert.load(folder).update(module)
    save_file(whole, path)
    declare(folder, "pick", save_base())
    edit_json(folder / "expert.json", head_seed="seven", colour="red")
    with pytest.raises(UserError, match=r"colour, head_seed"):
        LoraExpert.load(folder)
    (folder / "expert.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(UserError, match="version 99"):
        LoraExpert.load(folder)
    (folder / "expert.json").unlink()
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="cannot be read"):
        LoraExpert.load(folder)
    with pytest.raises(UserError, match="is not an expert"):
        LoraExpert.load(folder / "nowhere")


@pytest.mark.parametrize(("m", "n", "r"), [(9, 7, 3), (7, 9, 7), (5, 6, 8), (6, 5, 0)])
def test_factor_space_decomposition_is_that_of_the_matrix(m, n, r):
    generator = torch.Generator().manual_seed(m)
    update = LowRank(torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator))
    u, s, v = update.svd()
    torch.testing.assert_close((u * s) @ v, update.dense(), atol=1e-4, rtol=1e-4)
    expected = torch.linalg.svdvals(update.dense().double())[: min(m, n, r)]
    torch.testing.assert_close(s.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(u.T @ u, torch.eye(len(s)), atol=1e-5, rtol=0)
    torch.testing.assert_close(v @ v.T, torch.eye(len(s)), atol=1e-5, rtol=0)


def test_a_sum_of_updates_is_their_stacked_factors():
    generator = torch.Generator().manual_seed(0)
    updates = [
        LowRank(torch.randn(4, r, generator=generator), torch.randn(r, 5, generator=generator))
        for r in (1, 0, 2)
    ]
    torch.testing.assert_close(stack(updates).dense(), sum(u.dense() for u in updates))

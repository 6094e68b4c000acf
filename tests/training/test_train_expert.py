"""``vla train --expert``: what it trains, what it leaves, and that PEFT and `vla eval` read it."""

import dataclasses
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.optim import CosineDecayWithWarmupSchedulerConfig
from lerobot.utils.constants import PRETRAINED_MODEL_DIR, TRAINING_STATE_DIR
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from vla.errors import UserError
from vla.evaluation.policy_source import CheckpointSource, open_source
from vla.experts.expert_policy import find_base, load_expert_policy
from vla.experts.lora_expert import LoraExpert, base_hash, declare, find_expert
from vla.policy.checkpoint import load_checkpoint
from vla.policy.head import initialise_head
from vla.serving.serve import ServeConfig, serve_source
from vla.training.dataset import open_demonstrations
from vla.training.loop import train
from vla.training.lora import FULL, Adapter, LoraSettings
from vla.training.metrics import read_metrics
from vla.training.run_state import write_state

sys.path.insert(0, str(Path(__file__).parents[1] / "policy"))
from tiny_backbones import save_decoder

LAST = Path("checkpoints/last")
LORA = LoraSettings(rank=3, alpha=5.0, rslora=True)
FULL_NAMES = {"action_decoder", "film", "keyframe_head", "routers", "state_projector"}


def assert_same_files(a: Path, b: Path, names=("raw_model", "averaged_model", "optimizer_state")) -> None:
    for name in names:
        left, right = (load_file(run / LAST / TRAINING_STATE_DIR / f"{name}.safetensors") for run in (a, b))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name
    assert rows(a) == rows(b)


def rows(out: Path) -> list[tuple]:
    return [(row["kind"], row["step"], row["loss"]) for row in read_metrics(out / "metrics.jsonl")]


def resume_from_the_middle(finished: Path, config) -> Path:
    """Undo the last checkpoint of a finished run in a copy of it, and resume that."""
    shutil.copytree(finished, config.out, symlinks=True)
    record = json.loads((config.out / "train.json").read_text())
    record["config"]["out"] = str(config.out)
    (config.out / "train.json").write_text(json.dumps(record))
    shutil.rmtree(config.out / "checkpoints" / "000004")
    train(dataclasses.replace(config, resume=True))
    return config.out


def observation(seed=0):
    generator = np.random.default_rng(seed)
    images = {name: generator.integers(0, 256, (64, 64, 3), dtype=np.uint8) for name in ("image", "image2")}
    return images, generator.normal(size=8).astype(np.float32), "open the drawer"


def batch_for(loaded):
    return loaded.preprocessor(loaded.batch(*observation()))


@pytest.fixture(scope="module")
def base(small_config, tmp_path_factory):
    """A policy trained for two steps, as far as experts are concerned their pretrained base."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("base") / "run"
    train(small_config(out, steps=2))
    return (out / LAST / PRETRAINED_MODEL_DIR).resolve()


@pytest.fixture(scope="module")
def expert_run(small_config, base, tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("expert") / "run"
    before = base_hash(base)
    train(small_config(out, policy=(), expert="pick", base=base.parents[2], lora=LORA))
    assert base_hash(base) == before
    return out


def test_an_expert_is_a_peft_folder_with_a_card_and_a_contract(expert_run, base):
    folder = find_expert(expert_run)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "expert.json", "contract.json"}
    assert "model.safetensors" not in names
    expert = LoraExpert.load(folder)
    assert expert.card.name == "pick"
    assert expert.card.base == base_hash(base)
    assert expert.card.head_seed == load_checkpoint(base).policy.config.head_seed == 0
    assert expert.card.instructions == ("open the drawer", "pick up the soup")
    assert find_base(folder) == base
    assert expert.contract == load_checkpoint(base).contract
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["trained_parameters"] == sum(value.numel() for value in expert.tensors.values())
    assert manifest["parameters"] == load_checkpoint(base).manifest["parameters"]
    assert (expert_run / "curves.png").exists()
    assert [row[:2] for row in rows(expert_run) if row[0] == "held_out"] == [("held_out", 2), ("held_out", 4)]


def test_factors_learn_at_three_times_the_policys_rate(expert_run):
    parameter = torch.nn.Parameter(torch.zeros(1))
    expected = CosineDecayWithWarmupSchedulerConfig(200, 20_000, peak_lr=3e-3, decay_lr=3e-5).build(
        torch.optim.AdamW([parameter], lr=3e-3), 4
    )
    first = read_metrics(expert_run / "metrics.jsonl")[0]
    assert first["lr"] == pytest.approx(expected.get_last_lr()[0])


def test_factors_sit_on_every_linear_layer_that_is_not_trained_in_full(expert_run, base):
    expert, policy = LoraExpert.load(find_expert(expert_run)), load_checkpoint(base).policy
    in_full = {
        name
        for name, _ in policy.named_parameters()
        if FULL_NAMES & set(name.removesuffix(".weight").split("."))
    }
    assert set(expert.full_tensors) == in_full
    linear = {name for name, module in policy.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(expert.modules) == {name for name in linear if f"{name}.weight" not in in_full}
    assert {expert.rank(module) for module in expert.modules} == {3}
    assert expert.scale(expert.modules[0]) == pytest.approx(5 / 3**0.5)
    assert all(expert.update(module).dense().abs().max() > 0 for module in expert.modules)


def test_what_was_trained_is_what_is_loaded_by_us_and_by_peft_and_back(expert_run, base, tmp_path):
    folder = find_expert(expert_run)
    ours = load_expert_policy(base, folder)
    bare = load_checkpoint(base)
    batch = batch_for(ours)
    expected = ours.policy.predict_action_chunk(batch)
    assert not torch.allclose(expected, bare.policy.predict_action_chunk(batch), atol=1e-4)
    theirs = PeftModel.from_pretrained(bare.policy, folder).eval()
    torch.testing.assert_close(theirs.predict_action_chunk(batch), expected, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "back")
    first, second = LoraExpert.load(folder), LoraExpert.load(tmp_path / "back")
    assert set(first.tensors) == set(second.tensors)
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    declare(tmp_path / "back", "pick", base)
    again = load_expert_policy(base, tmp_path / "back")
    torch.testing.assert_close(again.policy.predict_action_chunk(batch), expected, rtol=0, atol=0)


def test_the_held_out_loss_is_that_of_the_expert_on_disk(expert_run, base, small_config):
    """The averaged factors are what is measured and what is shipped."""
    from accelerate import Accelerator

    from vla.training.batches import BatchSource
    from vla.training.frame_cache import open_frame_cache
    from vla.training.policy_setup import Start
    from vla.training.trainer import Trainer

    config = small_config(expert_run, ema_decay=0.0)
    loaded = load_expert_policy(base, find_expert(expert_run))
    data = [open_demonstrations(config.dataset[0], action_space=config.action_space)]
    frames = [open_frame_cache(data[0], loaded.policy.config.image_size, quiet=True)]
    source = BatchSource(data, frames, loaded.policy.config.action_delta_indices)
    measured = Trainer(config, data, source, Start(loaded), Accelerator(cpu=True)).held_out_loss()["loss"]
    assert measured == pytest.approx(rows(expert_run)[-1][2], rel=1e-5)


def test_a_resumed_expert_equals_the_uninterrupted_one_bit_for_bit(expert_run, small_run):
    resumed = resume_from_the_middle(expert_run, small_run(policy=()))
    assert_same_files(resumed, expert_run)
    first, second = (LoraExpert.load(find_expert(run)).tensors for run in (resumed, expert_run))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_in_bf16_the_frozen_layers_are_kept_rounded_and_training_is_the_same(
    base, small_run, tmp_path, monkeypatch
):
    config = small_run(policy=(), expert="pick", base=base, lora=LORA, precision="bf16")
    dtypes = set()

    def round_and_look(self, policy, dtype):
        round_frozen(self, policy, dtype)
        dtypes.update(value.dtype for name, value in policy.named_parameters() if ".base_layer." in name)

    round_frozen = Adapter.round_frozen
    monkeypatch.setattr(Adapter, "round_frozen", round_and_look)
    train(config)
    assert dtypes == {torch.bfloat16}
    monkeypatch.setattr(Adapter, "round_frozen", lambda *_: None)
    kept = dataclasses.replace(config, out=tmp_path / "float32")
    train(kept)
    assert_same_files(kept.out, config.out)


def test_saving_copies_no_weights_but_the_trained_ones(base, small_run, monkeypatch):
    """Two copies of a frozen base of 0.5 B took more memory than the training itself."""
    copied = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda x, **how: (copied.append(x), clone(x, **how))[1])
    seen = []

    def look(trainer, state, folder):
        trained = {name: p for name, p in trainer.policy.named_parameters() if p.requires_grad}
        assert state.raw.keys() == state.shipped.keys() == trained.keys()
        assert all(state.shipped[name].data_ptr() == p.data_ptr() for name, p in trained.items())
        frozen = {p.data_ptr() for p in trainer.policy.parameters() if not p.requires_grad}
        assert len(copied) >= len(trained) and not frozen & {x.data_ptr() for x in copied}
        seen.append(folder)
        write_state(trainer, state, folder)

    monkeypatch.setattr("vla.training.trainer.write_state", look)
    train(small_run(policy=(), expert="pick", base=base, lora=LORA))
    assert seen


def test_an_expert_starts_as_its_base_and_may_have_statistics_of_its_own(
    base, small_run, video_dataset, tmp_path
):
    other = shutil.copytree(video_dataset, tmp_path / "other", ignore=shutil.ignore_patterns(".cache"))
    statistics = json.loads((other / "meta" / "stats.json").read_text())
    for name in ("min", "max"):
        statistics["action"][name] = [2 * value for value in statistics["action"][name]]
    (other / "meta" / "stats.json").write_text(json.dumps(statistics))
    still = {"policy": (), "steps": 1, "lr": 1e-30, "expert": "turn", "base": base, "dataset": (other,)}
    train(small_run(**still, statistics="own", lora=LoraSettings(targets=("q_proj",), full=())))
    folder, before = find_expert(tmp_path / "run"), load_checkpoint(base)
    after = load_expert_policy(base, folder)
    batch = batch_for(after)
    torch.testing.assert_close(
        after.policy.predict_action_chunk(batch), before.policy.predict_action_chunk(batch), rtol=0, atol=0
    )
    numbers = after.contract.statistics["action"]
    assert numbers["max"] == pytest.approx(statistics["action"]["max"])
    assert after.contract.statistics["observation.state"] == before.contract.statistics["observation.state"]
    np.testing.assert_allclose(
        after.act(*observation()), 2 * before.act(*observation()), rtol=1e-4, atol=1e-5
    )
    expert = LoraExpert.load(folder)
    assert len(expert.modules) == 2 and not expert.full_tensors
    assert expert.rank(expert.modules[0]) == 16 and expert.scale(expert.modules[0]) == 2.0


def test_an_evaluation_takes_an_expert_like_a_checkpoint(expert_run, base, tmp_path):
    source = pickle.loads(pickle.dumps(open_source(expert_run)))
    folder = find_expert(expert_run)
    expected = load_expert_policy(base, folder).act(*observation())
    np.testing.assert_array_equal(source.load().act(*observation()), expected)
    assert source.contract == LoraExpert.load(folder).contract
    assert source.manifest["expert"] == "pick" and source.manifest["step"] == 4
    assert isinstance(open_source(base), CheckpointSource)
    copied = open_source(shutil.copytree(folder, tmp_path / "copy"))
    assert copied.hash == source.hash != open_source(base).hash
    with (tmp_path / "copy" / "adapter_config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(UserError, match="changed during the evaluation"):
        copied.load()


def test_a_server_answers_with_the_expert_on_its_base(expert_run, base):
    served = serve_source(open_source(expert_run), ServeConfig(device="cpu"))
    loaded = load_expert_policy(base, find_expert(expert_run))
    policy = served.make_policy()
    policy.reset(0)
    np.testing.assert_array_equal(policy.act(*observation()), loaded.act(*observation()))
    assert served.contract == loaded.contract


def test_a_head_started_anew_is_the_experts_own_and_says_its_seed(base, small_run, tmp_path):
    fresh = {"policy": (), "steps": 1, "lr": 1e-30, "ema_decay": 0.0, "expert": "turn", "base": base}
    train(small_run(**fresh, head_seed=7))
    folder, before = find_expert(tmp_path / "run"), load_checkpoint(base)
    expert = LoraExpert.load(folder)
    assert expert.card.head_seed == 7
    assert {"model.slots", "model.state_projector.0.bias"} <= set(expert.full_tensors)
    initialise_head(before.policy, 7)
    own = before.policy.state_dict()
    head = [name for name in expert.full_tensors if name.startswith("model.action_decoder.")]
    assert head
    for name in head:  # biases start at zero, and the smallest step leaves that
        torch.testing.assert_close(expert.tensors[name], own[name], rtol=0, atol=1e-12)
    ours = load_expert_policy(base, folder)
    batch = batch_for(ours)
    expected = ours.policy.predict_action_chunk(batch)
    torch.testing.assert_close(expected, before.policy.predict_action_chunk(batch), rtol=1e-5, atol=1e-6)
    theirs = PeftModel.from_pretrained(load_checkpoint(base).policy, folder).eval()
    torch.testing.assert_close(theirs.predict_action_chunk(batch), expected, rtol=1e-4, atol=1e-5)


def test_another_base_is_refused(expert_run, base, small_run, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.slots"] = weights["model.slots"] + 1
    save_file(weights, other / "model.safetensors")
    with pytest.raises(UserError, match=r"'pick'.*was trained on base"):
        load_expert_policy(other, find_expert(expert_run))
    config = small_run(policy=())
    shutil.copytree(expert_run, config.out, symlinks=True)
    record = json.loads((config.out / "train.json").read_text())
    record["config"] |= {"out": str(config.out), "base": str(other)}
    (config.out / "train.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"'pick'.*was trained on base"):
        train(dataclasses.replace(config, resume=True, steps=6))


def test_a_base_is_found_where_it_was_moved_to_together_with_its_expert(expert_run, base, tmp_path):
    trees = {run: run.parent.name for run in (expert_run, base.parents[2])}
    for run, name in trees.items():
        shutil.copytree(run, tmp_path / name / run.name, symlinks=True)
    folder = find_expert(tmp_path / trees[expert_run] / expert_run.name)
    moved = tmp_path / trees[base.parents[2]] / base.relative_to(base.parents[3])
    assert find_base(folder) == moved.resolve() != base, "the one beside it comes first"
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    assert find_base(folder) == moved.resolve(), "also where the old place is gone"
    weights = load_file(moved / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, moved / "model.safetensors")
    path.write_text(json.dumps(config))
    assert find_base(folder) == base, "another checkpoint that stands there is not taken for it"


def test_a_base_that_is_gone_is_a_sentence(expert_run, tmp_path):
    folder = shutil.copytree(find_expert(expert_run), tmp_path / "expert")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=r"is not at .*gone any more"):
        find_base(folder)
    path.write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="does not say where its base is"):
        find_base(folder)
    assert find_expert(tmp_path) is None


BAD = {
    "no base": ({"expert": "pick"}, "both --expert NAME and --base"),
    "no name": ({"base": Path("x")}, "both --expert NAME and --base"),
    "init from": ({"expert": "a", "base": Path("x"), "init_from": Path("y")}, "leave out --init-from"),
    "statistics": ({"statistics": "own"}, "--statistics own and --head-seed are for experts"),
    "options without rank": ({"lora": LoraSettings(alpha=4.0)}, "need --lora.rank"),
    "rank": ({}, "--lora.rank is 0"),
    "nothing to adapt": ({"lora": LoraSettings(rank=4)}, "name a trained one with --init-from"),
    "head seed": ({"head_seed": 1}, "--statistics own and --head-seed are for experts"),
    "base that is none": ({"expert": "pick", "base": Path("nowhere")}, "nowhere does not exist"),
}


@pytest.mark.parametrize(("changes", "sentence"), BAD.values(), ids=BAD.keys())
def test_bad_options_are_a_sentence_and_leave_nothing(small_run, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        settings = {"policy": ()} | changes
        train(small_run(**settings if changes else {"lora": LoraSettings(rank=0)}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            LoraSettings(targets=("q_prj",)),
            "--lora.targets q_prj matches no linear layer.*Did you mean 'q_proj'",
        ),
        (LoraSettings(full=("slot",)), "--lora.full slot matches no module.*Did you mean 'slots'"),
        (LoraSettings(full=("model",)), "No linear layer is left"),
    ],
)
def test_names_that_match_nothing_are_a_sentence(base, small_run, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        train(small_run(policy=(), expert="pick", base=base, lora=settings))


@pytest.fixture(scope="module")
def folded_run(small_config, base, tmp_path_factory):
    """Low-rank training of a whole policy, a single parameter and a glob among what is trained in full."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("folded") / "run"
    lora = LoraSettings(rank=2, targets=("*.layers.1.*",), full=(*FULL, "slots"))
    train(small_config(out, policy=(), init_from=base, lora=lora))
    return out


def test_low_rank_training_without_a_name_leaves_an_ordinary_checkpoint(folded_run, base):
    before, after = load_checkpoint(base), load_checkpoint(folded_run)
    averaged = load_file(folded_run / LAST / TRAINING_STATE_DIR / "averaged_model.safetensors")
    state, changed = before.policy.state_dict(), set()
    for name, value in after.policy.state_dict().items():
        a, b = (averaged.get(f"{name.removesuffix('.weight')}.lora_{side}.default.weight") for side in "AB")
        expected = averaged.get(name, state[name]) if a is None else state[name] + 2.0 * b @ a
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
        if not torch.equal(value, state[name]):
            changed.add(name)
    assert "model.slots" in changed and "model.action_decoder.out.weight" in changed
    layers = {name for name in changed if ".layers." in name}
    assert layers and all(".layers.1." in name and name.endswith("_proj.weight") for name in layers)
    assert not any(".stem." in name or "embed_tokens" in name for name in changed)
    assert after.contract == before.contract
    assert after.manifest["parameters"] == before.manifest["parameters"]


def test_low_rank_training_resumes_bit_for_bit(folded_run, small_run):
    resumed = resume_from_the_middle(folded_run, small_run(policy=()))
    assert_same_files(resumed, folded_run)
    first, second = (load_checkpoint(run).policy.state_dict() for run in (resumed, folded_run))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_new_parts_around_a_pretrained_backbone_are_trained_in_full(small_run, tmp_path):
    folder = save_decoder(tmp_path / "llama")
    sizes = tuple(
        size for size in small_run().policy if not size.startswith(("hidden", "intermediate", "decoder"))
    )
    config = small_run(policy=(*sizes, f"decoder_backbone={folder}"), lora=LoraSettings(rank=2), lr=1e-2)
    train(config)
    shutil.rmtree(folder)  # the checkpoint is whole
    state = load_checkpoint(config.out).policy.state_dict()
    pretrained = LlamaForCausalLM.from_pretrained(save_decoder(tmp_path / "llama")).model.state_dict()
    trained = load_file(config.out / LAST / TRAINING_STATE_DIR / "raw_model.safetensors")
    for name, value in pretrained.items():
        full_name = f"model.decoder.backbone.{name}"
        assert full_name not in trained
        delta = state[full_name] - value
        if name.endswith("_proj.weight"):
            assert delta.abs().max() > 0 and torch.linalg.matrix_rank(delta, rtol=1e-3) <= 2, name
        else:
            assert not delta.any(), name
    outside = {name for name in state if not name.startswith("model.decoder.backbone.")}
    assert outside == {name for name in trained if ".lora_" not in name}

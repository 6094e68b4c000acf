"""What a checkpoint keeps, and every way in which a broken one is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vla.contract import OSC_POSE_DELTA, Camera, ContractError, Interface, Vector
from vla.errors import UserError
from vla.policy.checkpoint import checkpoint_hash, load_checkpoint, resolve_checkpoint, save_checkpoint
from vla.policy.manifest import describe_build, make_contract
from vla.policy.modeling_cogmerge import CogMergePolicy
from vla.policy.processor_cogmerge import make_cogmerge_pre_post_processors

NORMALIZER = "policy_preprocessor_step_5_normalizer_processor.safetensors"
UNNORMALIZER = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
STATISTICS = {
    "observation.state": {"mean": np.arange(8.0), "std": np.full(8, 0.3)},
    "action": {"min": -np.ones(7), "max": np.full(7, 0.7)},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_config):
    """A run folder with one checkpoint, made once; tests that damage it work on a copy."""
    config = make_config()
    torch.manual_seed(3)
    policy = CogMergePolicy(config)
    interface = Interface(
        cameras=tuple(Camera(key, 64, 64) for key in config.camera_keys),
        state=Vector("observation.state", tuple(f"s{i}" for i in range(8))),
        action=Vector("action", tuple(f"a{i}" for i in range(7))),
        action_space=OSC_POSE_DELTA,
        control_rate=20.0,
    )
    run = tmp_path_factory.mktemp("run")
    save_checkpoint(
        run / "checkpoints" / "000005" / "pretrained_model",
        policy,
        *make_cogmerge_pre_post_processors(config, STATISTICS),
        make_contract(config, interface, STATISTICS),
        describe_build(policy, seed=7, step=5, dataset="demo", dataset_hash="0" * 64),
    )
    (run / "checkpoints" / "last").symlink_to("000005")
    return run, policy


@pytest.fixture
def folder(saved, tmp_path):
    target = tmp_path / "pretrained_model"
    shutil.copytree(saved[0] / "checkpoints" / "000005" / "pretrained_model", target)
    return target


def observation(seed=0):
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for name in ("image", "image2")}
    return images, rng.normal(size=8).astype(np.float32)


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    "inner", ["", "checkpoints/last", "checkpoints/000005", "checkpoints/000005/pretrained_model"]
)
def test_every_way_to_name_a_checkpoint(saved, inner):
    assert (resolve_checkpoint(saved[0] / inner) / "model.safetensors").is_file()


def test_loading_draws_no_weights_to_throw_them_away(folder, monkeypatch):
    """At 0.5 B that took 26 of 37 seconds."""

    def drawn(*_, **__):
        raise AssertionError("weights are drawn")

    for name in ("normal_", "uniform_", "trunc_normal_"):
        monkeypatch.setattr(torch.Tensor, name, drawn, raising=False)
    load_checkpoint(folder)


def test_loaded_policy_predicts_what_the_saved_one_did(saved):
    run, policy = saved
    loaded = load_checkpoint(run)
    images, state = observation()
    chunk = loaded.act(images, state, "open the drawer")
    assert chunk.shape == (4, 7) and chunk.dtype == np.float32
    batch = loaded.preprocessor(
        {
            f"observation.images.{k}": torch.from_numpy(v).permute(2, 0, 1)[None] / 255
            for k, v in images.items()
        }
        | {"observation.state": torch.from_numpy(state)[None], "task": ["open the drawer"]}
    )
    expected = (policy.predict_action_chunk(batch) + 1) / 2 * 1.7 - 1
    np.testing.assert_allclose(chunk, expected[0].numpy(), atol=1e-5)


def test_acting_folds_no_state(saved):
    loaded = load_checkpoint(saved[0])
    images, state = observation()
    first = loaded.act(images, state, "open it")
    loaded.act(*observation(1), "close it")
    assert np.array_equal(loaded.act(images, state, "open it"), first)
    assert np.array_equal(
        loaded.act({f"observation.images.{k}": v for k, v in images.items()}, state, "open it"), first
    )


def test_report_says_what_each_layer_kept(saved):
    loaded = load_checkpoint(saved[0])
    images, state = observation()
    actions, report = loaded.act_with_report(images, state, "open it")
    np.testing.assert_allclose(actions, loaded.act(images, state, "open it"), atol=1e-6)
    assert {layer: len(kept) for layer, kept in report.kept.items()} == {1: 4, 2: 4}
    assert report.cameras == ("observation.images.image", "observation.images.image2")
    heat = report.heat("observation.images.image", 1)
    assert heat.shape == (2, 2) and heat.min() >= 0 and heat.sum() <= 1 + 1e-5


def test_manifest_says_where_it_comes_from(saved):
    manifest = load_checkpoint(saved[0]).manifest
    assert manifest["versions"].keys() == {
        "python",
        "torch",
        "lerobot",
        "transformers",
        "lerobot_policy_cogmerge",
    }
    assert manifest["parameters"] == sum(p.numel() for p in saved[1].parameters())
    assert (manifest["seed"], manifest["step"], manifest["dataset"]) == (7, 5, "demo")
    assert manifest["choice"] == "last step"


def test_hash_names_the_checkpoint(folder, saved):
    assert checkpoint_hash(folder) == checkpoint_hash(saved[0])
    edit_tensors(folder / "model.safetensors", lambda t: t["model.slots"].add_(1e-3))
    assert checkpoint_hash(folder) != checkpoint_hash(saved[0])


def test_saving_again_replaces_and_leaves_nothing_behind(saved, tmp_path):
    loaded = load_checkpoint(saved[0])
    for _ in range(2):
        save_checkpoint(
            tmp_path / "x",
            loaded.policy,
            loaded.preprocessor,
            loaded.postprocessor,
            loaded.contract,
            {"step": 1},
        )
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
    assert load_checkpoint(tmp_path / "x").contract == loaded.contract


def test_failed_save_leaves_the_old_checkpoint(folder, monkeypatch):
    loaded = load_checkpoint(folder)
    before = checkpoint_hash(folder)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(loaded.contract), "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(
            folder, loaded.policy, loaded.preprocessor, loaded.postprocessor, loaded.contract, loaded.manifest
        )
    assert checkpoint_hash(folder) == before and [e.name for e in folder.parent.iterdir()] == [folder.name]


DAMAGE = {
    "missing statistic in the contract": (
        lambda f: edit_contract(f, lambda c: c["statistics"]["observation.state"].pop("std")),
        "statistic 'std' of 'observation.state' is missing",
    ),
    "missing statistic in the processor": (
        lambda f: edit_tensors(f / NORMALIZER, lambda t: t.pop("observation.state.std")),
        "statistic 'std' of 'observation.state' is missing",
    ),
    "missing action statistic after the model": (
        lambda f: edit_tensors(f / UNNORMALIZER, lambda t: t.pop("action.max")),
        "statistic 'max' of 'action' is missing",
    ),
    "edited statistics in the contract": (
        lambda f: edit_json(
            f / "contract.json", lambda c: c["statistics"]["action"]["max"].__setitem__(0, 9.0)
        ),
        "do not match their recorded hash",
    ),
    "edited statistics in the processor": (
        lambda f: edit_tensors(f / NORMALIZER, lambda t: t["observation.state.mean"].add_(1)),
        "'mean' of 'observation.state' in the processors .* differs from the contract",
    ),
    "edited action statistics in the processor": (
        lambda f: edit_tensors(f / UNNORMALIZER, lambda t: t["action.max"].mul_(2)),
        "'max' of 'action' in the processors .* differs from the contract",
    ),
    "wrong camera name": (
        lambda f: edit_json(
            f / "contract.json",
            lambda c: c["interface"]["cameras"][0].update(key="observation.images.front"),
        ),
        "contradicts itself: its contract names the cameras",
    ),
    "wrong state size": (
        lambda f: edit_json(f / "contract.json", lambda c: c["interface"]["state"].update(names=["x", "y"])),
        "its contract has state size 2, its config 8",
    ),
    "wrong chunk": (
        lambda f: edit_json(f / "contract.json", lambda c: c.update(chunk_size=16)),
        "its contract has chunk size 16, its config 4",
    ),
    "unknown tensor": (
        lambda f: edit_tensors(f / "model.safetensors", lambda t: t.update(extra=torch.zeros(1))),
        "do not fit the policy .*extra",
    ),
    "missing tensor": (
        lambda f: edit_tensors(f / "model.safetensors", lambda t: t.pop("model.slots")),
        "do not fit the policy .*model.slots",
    ),
    "tensor of another shape": (
        lambda f: edit_tensors(
            f / "model.safetensors", lambda t: t.update({"model.slots": torch.zeros(2, 2)})
        ),
        "do not fit the policy .*model.slots",
    ),
    "truncated weights": (
        lambda f: truncate(f / "model.safetensors"),
        "truncated or not a safetensors file",
    ),
    "truncated statistics": (lambda f: truncate(f / NORMALIZER), "processors in .* cannot be loaded"),
    "truncated config": (lambda f: truncate(f / "config.json"), "is not valid JSON"),
    "truncated contract": (lambda f: truncate(f / "contract.json"), "is not valid JSON"),
    "truncated manifest": (lambda f: truncate(f / "manifest.json"), "is not valid JSON"),
    "truncated processor": (
        lambda f: truncate(f / "policy_preprocessor.json"),
        "processors in .* cannot be loaded",
    ),
    "missing weights": (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
    "missing contract": (lambda f: (f / "contract.json").unlink(), "lacks contract.json"),
    "missing processor state": (lambda f: (f / NORMALIZER).unlink(), "processors in .* cannot be loaded"),
    "another policy's folder": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(type="act")),
        "policy of type 'act', not a CogMerge checkpoint",
    ),
    "unknown configuration key": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(flux_capacitor=1)),
        "config.json was not written by this release",
    ),
    "contract of a later release": (
        lambda f: edit_json(f / "contract.json", lambda c: c.update(version=99)),
        "has contract version 99",
    ),
}


def edit_contract(folder, change):
    """Change the contract and its hash together, as somebody would who knows about the hash."""
    from vla.contract import PolicyContract

    contract = PolicyContract.load(folder)
    content = json.loads((folder / "contract.json").read_text())
    change(content)
    altered = type(contract)(**(vars(contract) | {"statistics": content["statistics"]}))
    altered.save(folder)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoint_is_refused_with_a_sentence(folder, name):
    damage, sentence = DAMAGE[name]
    damage(folder)
    with pytest.raises(UserError, match=sentence) as refused:
        load_checkpoint(folder)
    assert "\n" not in str(refused.value)


def test_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="is not a checkpoint"):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda images, state: ({"front": images["image"]}, state),
            "lacks camera 'observation.images.image'",
        ),
        (
            lambda images, state: (images | {"image": images["image"][:32]}, state),
            "expects uint8 .64, 64, 3.",
        ),
        (lambda images, state: (images | {"image": images["image"] / 255.0}, state), "gave float64"),
        (lambda images, state: (images, state[:7]), "the policy expects 8 entries"),
    ],
)
def test_observation_that_does_not_fit_is_refused(saved, change, sentence):
    loaded = load_checkpoint(saved[0])
    with pytest.raises(ContractError, match=sentence):
        loaded.act(*change(*observation()), "open it")


def test_lerobot_itself_loads_strictly(folder):
    """LeRobot asks for strict=False; a policy must not come up with random tensors."""
    edit_tensors(folder / "model.safetensors", lambda t: t.pop("model.slots"))
    with pytest.raises(UserError, match="do not fit"):
        CogMergePolicy.from_pretrained(folder)

"""`vla convert`: from a released folder to a checkpoint that acts as the released model does."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vla import cli
from vla.policy.checkpoint import load_checkpoint
from vla.policy.images import resize_area
from vla.policy.presets import OPENVLA_PROMPT

sys.path.insert(0, str(Path(__file__).parents[1] / "policy"))
import released_models as released
from tiny_backbones import byte_tokenizer

STATISTICS = {
    "proprio": {
        "q01": [-1.0, -2.0, 0.0, 0.5, -3.0, 0.0, 0.0, -1.0],
        "q99": [1.0, 2.0, 4.0, 0.5, 3.0, 1.0, 2.0, 0.0],
    },
    "action": {
        "q01": [-0.5, -0.4, -0.3, -0.2, -0.1, 0.0, 0.0],
        "q99": [0.5, 0.6, 0.7, 0.2, 0.1, 0.3, 1.0],
        "mask": [True] * 6 + [False],
    },
}


def write_released(folder, tensors, statistics=None):
    """As CogVLA saves it: a merged model with bare encoders, and beside it what was trained in full."""
    folder.mkdir()
    files = {name: {} for name in ("model", "vision_backbone", "proprio_projector", "action_head")}
    for name, value in tensors.items():
        part = name.split(".")[0]
        if part in files:
            files[part]["module." * (part == "action_head") + name.removeprefix(part + ".")] = value
        else:
            files["model"][name] = value
    # The merged model also has the encoders from before they were wrapped; they must not win.
    files["model"] |= {
        name: torch.zeros_like(value)
        for name, value in released.openvla_tensors().items()
        if name.startswith("vision_backbone.")
    }
    for part, content in files.items():
        suffix = "" if part == "model" else "--70000_checkpoint"
        if content:
            save_file(content, folder / f"{part}{suffix}.safetensors", {"format": "pt"})
    text_config = {"model_type": "llama", "num_attention_heads": released.HEADS}
    (folder / "config.json").write_text(json.dumps({"model_type": "openvla", "text_config": text_config}))
    known = {"libero_spatial_no_noops": STATISTICS} if statistics is None else statistics
    (folder / "dataset_statistics.json").write_text(json.dumps(known))
    byte_tokenizer("llama").save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("released") / "cogvla", released.cogvla_tensors())


def run(*arguments):
    return cli.run(["convert", *map(str, arguments), "--chunk-size", str(released.CHUNK)])


def released_answer(images, state, instruction):
    """Released pre-processing, model and post-processing, in LIBERO's action units."""
    low, high = (torch.tensor(STATISTICS["proprio"][q]) for q in ("q01", "q99"))
    scaled = torch.where(low == high, 0, 2 * (torch.from_numpy(state) - low) / (high - low + 1e-8) - 1)
    side = released.PATCH * released.GRID
    pixels = torch.stack([resize_area(torch.from_numpy(i).permute(2, 0, 1), side) for i in images]) / 255
    ids = byte_tokenizer("llama").encode(OPENVLA_PROMPT.format(instruction=instruction)).ids
    raw = released.Released(released.cogvla_tensors()).actions(pixels, scaled.clamp(-1, 1), ids)
    low, high = (torch.tensor(STATISTICS["action"][q]) for q in ("q01", "q99"))
    actions = 0.5 * (raw + 1) * (high - low + 1e-8) + low
    actions[:, 6] = 1 - 2 * raw[:, 6]  # open is 1 there and -1 here
    return actions.numpy()


def test_the_checkpoint_acts_as_the_released_model(source, tmp_path):
    assert run(source, tmp_path / "out") == 0
    loaded = load_checkpoint(tmp_path / "out")
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (256, 256, 3), dtype=np.uint8) for _ in range(2)]
    state = np.array([0.3, -1.0, 9.0, 0.5, 1.0, 0.2, 1.5, -0.5], np.float32)  # the third is out of range
    keys = [camera.key for camera in loaded.contract.interface.cameras]
    for instruction in ("open it", "pick up the milk and place it in the basket"):
        actions = loaded.act(dict(zip(keys, images, strict=True)), state, instruction)
        np.testing.assert_allclose(actions, released_answer(images, state, instruction), atol=1e-3)
    assert loaded.manifest["converted_from"] == "cogvla" and loaded.manifest["trained"]
    assert loaded.contract.normalization == {"observation.state": "QUANTILES", "action": "QUANTILES"}


def test_openvla_is_converted_as_a_start(tmp_path):
    folder = write_released(tmp_path / "openvla", {})
    save_file(released.openvla_tensors(), folder / "model.safetensors", {"format": "pt"})
    assert run(folder, tmp_path / "out") == 0
    assert load_checkpoint(tmp_path / "out").manifest["trained"] is False


def refused(capsys, *arguments):
    assert run(*arguments) == 2
    return " ".join(capsys.readouterr().err.split())


def test_missing_and_unexpected_tensors_are_refused_with_their_names(tmp_path, capsys):
    tensors = released.cogvla_tensors()
    del tensors["featurizer_proj.fc2.bias"]
    folder = write_released(tmp_path / "part", tensors | {"moe_router.extra": torch.zeros(1)})
    said = refused(capsys, folder, tmp_path / "out")
    assert "lacks 1 tensors (featurizer_proj.fc2.bias)" in said
    assert "unexpected 1 tensors (moe_router.extra)" in said
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_not_read(tmp_path, capsys):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "action_head--70000_checkpoint.pt").write_bytes(b"\x80\x04N.")
    assert "never unpickles" in refused(capsys, folder, tmp_path / "out")


def test_ambiguous_or_incomplete_statistics_are_refused(tmp_path, capsys):
    two = {"libero_goal_no_noops": STATISTICS, "libero_spatial_no_noops": STATISTICS}
    folder = write_released(tmp_path / "two", released.cogvla_tensors(), two)
    assert "Say with --statistics" in refused(capsys, folder, tmp_path / "out")
    said = refused(capsys, folder, tmp_path / "out", "--statistics", "libero_gaol_no_noops")
    assert "Did you mean 'libero_goal_no_noops'" in said
    bare = {"x": {"proprio": STATISTICS["proprio"], "action": {"mean": [0.0]}}}
    (folder / "dataset_statistics.json").write_text(json.dumps(bare))
    assert "lack the quantiles q01 and q99 of 'action'" in refused(capsys, folder, tmp_path / "out")


def test_an_existing_folder_is_not_replaced(source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert "exists already" in refused(capsys, source, tmp_path / "out")

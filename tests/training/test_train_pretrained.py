"""Training from pretrained backbones: their weights at the start, nothing but the checkpoint afterwards."""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from vla.policy.checkpoint import load_checkpoint
from vla.training.loop import train

sys.path.insert(0, str(Path(__file__).parents[1] / "policy"))
from tiny_backbones import save_decoder, save_vision


def test_a_run_starts_from_the_backbones_and_resumes_without_them(small_config, tmp_path):
    folders = tmp_path / "folders"
    encoders = [save_vision(folders / kind, kind) for kind in ("dinov2_with_registers", "siglip")]
    decoder = save_decoder(folders / "llama", "llama")
    policy = (
        f"vision_backbones={json.dumps(encoders)}",
        f"decoder_backbone={decoder}",
        "image_size=32",
        "aggregation_tokens=4",
        "prompt=do this: {instruction}",
    )
    start = load_file(folders / "llama/model.safetensors")
    config = small_config(tmp_path / "run", policy=policy, steps=1, eval_every=1, checkpoint_every=1)
    train(config)
    shutil.rmtree(folders)
    loaded = load_checkpoint(tmp_path / "run")
    trained = loaded.policy.model.decoder.backbone.layers[1].mlp.up_proj.weight
    given = start["model.layers.1.mlp.up_proj.weight"]
    moved = (trained - given).norm() / given.norm()
    assert 0 < moved < 0.02  # one step of a warm-up away from the given weights, not from random ones
    assert loaded.policy.config.prompt == "do this: {instruction}"
    train(
        small_config(tmp_path / "run", policy=policy, steps=2, eval_every=1, checkpoint_every=1, resume=True)
    )
    again = load_checkpoint(tmp_path / "run")
    assert again.manifest["step"] == 2
    assert not torch.equal(again.policy.model.decoder.backbone.layers[1].mlp.up_proj.weight, trained)

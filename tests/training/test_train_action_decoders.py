"""`vla train --policy action_decoder=NAME` trains, resumes bit for bit and ships a checkpoint that acts."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vla.policy.action_decoders import ACTION_DECODERS
from vla.policy.checkpoint import load_checkpoint
from vla.training.loop import train

LAYERED = [name for name, decoder in ACTION_DECODERS.items() if decoder.reads_layers]


@pytest.mark.parametrize("name", LAYERED)
def test_a_run_ends_in_a_checkpoint_that_acts(small_run, name):
    config = small_run(steps=2, seed=3)
    config = dataclasses.replace(
        config, policy=(*config.policy, f"action_decoder={name}", "action_queries=2")
    )
    train(config)
    loaded = load_checkpoint(config.out)
    assert (loaded.policy.config.action_decoder, loaded.policy.config.action_queries) == (name, 2)
    assert loaded.policy.config.head_seed == 3
    image = np.zeros((64, 64, 3), np.uint8)
    images = dict.fromkeys(("image", "image2"), image)
    chunk, report = loaded.act_with_report(images, np.zeros(8, np.float32), "open the drawer")
    assert chunk.shape == (8, 7) and np.isfinite(chunk).all() and report is not None
    other = loaded.act(images, np.ones(8, np.float32), "open the drawer")
    assert np.abs(chunk - other).max() > 1e-6  # the state reaches it outside of the language model


def test_a_resumed_run_is_the_same_run(small_run, small_config, tmp_path):
    config = small_run(steps=4)
    config = dataclasses.replace(config, policy=(*config.policy, "action_decoder=cross_attention"))
    train(config)
    copy = tmp_path / "copy"
    shutil.copytree(config.out, copy, symlinks=True)
    record = json.loads((copy / "train.json").read_text())
    record["config"]["out"] = str(copy)
    (copy / "train.json").write_text(json.dumps(record))
    shutil.rmtree(copy / "checkpoints" / "000004")
    train(dataclasses.replace(config, out=copy, resume=True))
    weights = [
        load_file(run / "checkpoints/000004/pretrained_model/model.safetensors") for run in (config.out, copy)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

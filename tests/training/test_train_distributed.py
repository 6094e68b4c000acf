"""Two processes on gloo learn what one does from the whole batch; memory is saved without changing a bit."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lerobot.utils.constants import PRETRAINED_MODEL_DIR, TRAINING_STATE_DIR
from safetensors.torch import load_file, save_file

from vla.errors import UserError
from vla.experts.lora_expert import LoraExpert, find_expert
from vla.policy.checkpoint import load_checkpoint
from vla.policy.units import units
from vla.training.full_state import gather_weights
from vla.training.loop import train
from vla.training.lora import LoraSettings
from vla.training.metrics import read_metrics
from vla.training.recompute import recompute_activations

LAST = Path("checkpoints/last")
LORA = LoraSettings(rank=2)


def losses(out: Path) -> dict[tuple[str, int], float]:
    return {(row["kind"], row["step"]): row["loss"] for row in read_metrics(out / "metrics.jsonl")}


def back_to_step_2(finished: Path, out: Path) -> Path:
    """A copy of a run of four steps as it was after two."""
    shutil.copytree(finished, out, symlinks=True)
    record = json.loads((out / "train.json").read_text())
    record["config"]["out"] = str(out)
    (out / "train.json").write_text(json.dumps(record))
    shutil.rmtree(out / "checkpoints" / "000004")
    return out


def launch(jobs: list[tuple], folder: Path) -> None:
    content = [{"config": config.to_json(), "shard": shard} for config, shard in jobs]
    (folder / "jobs.json").write_text(json.dumps(content))
    worker = Path(__file__).with_name("distributed_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(worker)]
    done = subprocess.run([*command, str(folder / "jobs.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def test_weights_that_share_a_storage_can_be_written(tmp_path):
    """DDP puts parameters side by side; those that stand alone are not copied."""
    model, flat = torch.nn.Linear(3, 2), torch.arange(8.0)
    alone = gather_weights(model)
    assert alone["weight"].data_ptr() == model.weight.data_ptr()
    model.weight.data, model.bias.data = flat[:6].view(2, 3), flat[6:]
    save_file(gather_weights(model), tmp_path / "weights.safetensors")
    written = load_file(tmp_path / "weights.safetensors")
    assert torch.equal(torch.cat([written["weight"].flatten(), written["bias"]]), flat)


@pytest.fixture(scope="module")
def plain(small_config, tmp_path_factory):
    """Four steps in one process; without augmentation, whose noise is every process's own."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("plain") / "run"
    train(small_config(out, augment=False))
    return out


def test_recomputing_activations_changes_nothing_but_memory(plain, small_run):
    config = small_run(augment=False, gradient_checkpointing=True)
    train(config)
    assert losses(config.out) == losses(plain)
    first, second = (
        load_file(run / LAST / TRAINING_STATE_DIR / "raw_model.safetensors") for run in (plain, config.out)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_recomputing_keeps_a_fraction_of_the_activations(plain):
    loaded = load_checkpoint(plain)
    tokens = torch.randint(0, 30, (4, 8))
    batch = {key: torch.rand(4, 3, 32, 32) for key in loaded.policy.config.camera_keys}
    batch |= {"observation.state": torch.randn(4, 8), "observation.language.tokens": tokens}
    batch |= {"observation.language.attention_mask": tokens >= 0, "action": torch.randn(4, 8, 7)}

    def kept_bytes() -> int:
        total, seen = 0, set()

        def pack(tensor):
            nonlocal total
            if tensor.untyped_storage().data_ptr() not in seen:
                seen.add(tensor.untyped_storage().data_ptr())
                total += tensor.untyped_storage().nbytes()
            return tensor

        parameters = {p.untyped_storage().data_ptr() for p in loaded.policy.parameters()}
        seen |= parameters
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loaded.policy.forward(batch)[0].backward()
        return total

    loaded.policy.train()
    before = kept_bytes()
    gradients = [p.grad.clone() for p in loaded.policy.parameters() if p.grad is not None]
    loaded.policy.zero_grad()
    recompute_activations(loaded.policy)
    assert kept_bytes() < 0.7 * before
    again = [p.grad for p in loaded.policy.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_units_are_what_is_called_whole(plain):
    policy = load_checkpoint(plain).policy
    assert policy._no_split_modules == ["LlamaAttention", "LlamaMLP", "VisionBlock"]
    assert len(units(policy)) == 2 * 2 + 1
    called = set()
    for unit in units(policy):
        unit.register_forward_hook(lambda module, *_: called.add(module))
    loaded = load_checkpoint(plain)
    loaded.policy = policy
    image = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    loaded.act({"image": image, "image2": image}, torch.zeros(8).numpy(), "open the drawer")
    assert called == set(units(policy))


def test_a_batch_that_the_processes_cannot_share_is_a_sentence(plain, small_run):
    from vla.training.config import open_run

    config = dataclasses.replace(small_run(out=plain, policy=()), resume=True, batch_size=2)
    assert open_run(config, processes=2)[0].batch_size == 2
    with pytest.raises(UserError, match="4 samples per step, which 3 processes cannot share evenly"):
        open_run(config, processes=3)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_the_whole_batch(plain, small_config, tmp_path):
    base = (plain / LAST / PRETRAINED_MODEL_DIR).resolve()
    expert = {"policy": (), "expert": "pick", "base": base, "lora": LORA, "augment": False}
    one = small_config(tmp_path / "expert", **expert)
    train(one)
    half = {"batch_size": 2, "augment": False}
    resumed = [back_to_step_2(plain, tmp_path / f"resumed_{kind}") for kind in ("ddp", "fsdp")]
    again = {"resume": True, "policy": (), "augment": False}
    jobs = [
        (small_config(tmp_path / "ddp", **half), False),
        (small_config(tmp_path / "fsdp", **half, gradient_checkpointing=True), True),
        (small_config(tmp_path / "expert_fsdp", **expert | half), True),
        (small_config(tmp_path / "expert_ddp", **expert | half), False),
        (small_config(resumed[0], **again | {"batch_size": 2}), False),
        (small_config(resumed[1], **again | {"batch_size": 2}), True),
    ]
    launch(jobs, tmp_path)
    for out in (tmp_path / "ddp", tmp_path / "fsdp", *resumed):
        assert losses(out) == pytest.approx(losses(plain), rel=1e-4), out.name
        first, second = (load_checkpoint(run).policy.state_dict() for run in (out, plain))
        for name, value in first.items():
            torch.testing.assert_close(value, second[name], rtol=1e-2, atol=2e-3)
    for out in (tmp_path / "expert_ddp", tmp_path / "expert_fsdp"):
        assert losses(out) == pytest.approx(losses(one.out), rel=1e-4), out.name
        assert set(LoraExpert.load(find_expert(out)).tensors) == set(
            LoraExpert.load(find_expert(one.out)).tensors
        )
    state = json.loads((tmp_path / "fsdp" / LAST / TRAINING_STATE_DIR / "training_step.json").read_text())
    assert state == {"step": 4, "num_processes": 2, "batch_size": 2}
    # What two processes with shards wrote, one process without continues.
    back = back_to_step_2(tmp_path / "fsdp", tmp_path / "back")
    train(small_config(back, resume=True, policy=(), augment=False, gradient_checkpointing=True))
    assert losses(back) == pytest.approx(losses(plain), rel=1e-4)

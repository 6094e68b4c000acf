import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.utils.constants import PRETRAINED_MODEL_DIR, TRAINING_STATE_DIR
from safetensors import SafetensorError
from safetensors.torch import load_file

from vla import cli
from vla.contract import JOINT_POSITION, OSC_POSE_DELTA
from vla.errors import UserError
from vla.policy.checkpoint import load_checkpoint
from vla.training import checkpoints, run_state
from vla.training.ema import WeightAverage
from vla.training.loop import train
from vla.training.metrics import read_metrics
from vla.training.trainer import Trainer

LAST = Path("checkpoints/last")


def signal_at_step(monkeypatch, step, number=signal.SIGINT):
    update = Trainer.update

    def update_and_signal(self, batch):
        values = update(self, batch)
        if self.step == step:
            os.kill(os.getpid(), number)
        return values

    monkeypatch.setattr(Trainer, "update", update_and_signal)


def tensors(out: Path) -> dict[str, torch.Tensor]:
    folder = out / LAST
    files = (
        f"{PRETRAINED_MODEL_DIR}/model.safetensors",
        f"{TRAINING_STATE_DIR}/raw_model.safetensors",
        f"{TRAINING_STATE_DIR}/optimizer_state.safetensors",
    )
    return {f"{name}:{key}": value for name in files for key, value in load_file(folder / name).items()}


def losses(out: Path, kind="train") -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(out / "metrics.jsonl") if row["kind"] == kind}


def assert_same_run(a: Path, b: Path) -> None:
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    assert losses(a) == losses(b)
    assert losses(a, "held_out") == losses(b, "held_out")


@pytest.fixture(scope="module")
def finished(small_config, tmp_path_factory):
    """The uninterrupted run of four steps that the others are compared with."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("finished") / "run"
    train(small_config(out))
    return out


def test_a_run_leaves_checkpoints_metrics_and_a_picture(finished):
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["000002", "000004", "last"]
    assert os.readlink(finished / LAST) == "000004"
    assert sorted(losses(finished)) == [1, 2, 3, 4]
    assert sorted(losses(finished, "held_out")) == [2, 4]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    loaded = load_checkpoint(finished)
    assert loaded.manifest["step"] == 4
    assert loaded.manifest["choice"] == "last step"
    assert loaded.manifest["dataset_hash"]
    assert loaded.contract.interface.action_space == OSC_POSE_DELTA
    image = np.zeros((64, 64, 3), np.uint8)
    chunk = loaded.act({"image": image, "image2": image}, np.zeros(8, np.float32), "open the drawer")
    assert chunk.shape == (8, 7)


def test_saved_weights_are_the_average_of_the_raw_ones(finished):
    folder = finished / LAST
    saved = load_file(folder / PRETRAINED_MODEL_DIR / "model.safetensors")
    raw = load_file(folder / TRAINING_STATE_DIR / "raw_model.safetensors")
    assert saved.keys() == raw.keys()
    assert any(not torch.equal(saved[key], raw[key]) for key in raw)


def test_average_follows_its_recurrence():
    model = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, decay=0.25)
    expected = None
    for n, value in enumerate((1.0, 5.0, -3.0, 2.0)):
        torch.nn.init.constant_(model.weight, value)
        average.update()
        decay = min(0.25, (1 + n) / (10 + n))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        with average.applied():
            assert model.weight.item() == pytest.approx(expected)
        assert model.weight.item() == value


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(finished, small_run, monkeypatch, number):
    config = small_run()
    with monkeypatch.context() as patch:
        signal_at_step(patch, 3, number)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert os.readlink(config.out / LAST) == "000003"
    train(small_run(resume=True))
    assert losses(config.out) == losses(finished)
    assert {k: v.tolist() for k, v in tensors(config.out).items()} == {
        k: v.tolist() for k, v in tensors(finished).items()
    }


def test_a_head_that_the_dataset_never_teaches_does_not_stop_a_resume(small_run):
    """Joint actions have no keyframes: that head gets no gradient, so there is no state of it to save."""
    untaught = {"action_space": JOINT_POSITION}
    out = small_run(**untaught, steps=2).out
    train(small_run(**untaught, steps=2))
    train(small_run(**untaught, resume=True, steps=4))
    assert os.readlink(out / LAST) == "000004"


def test_a_head_for_another_keyframe_is_left_untaught(small_run):
    """A checkpoint from elsewhere may have one; the dataset's keyframes (3 entries) do not fit it."""
    config = small_run(steps=2, policy=(*small_run().policy, "keyframe_dim=2"))
    train(config)
    rows = [row for row in read_metrics(config.out / "metrics.jsonl") if row["kind"] == "train"]
    assert len(rows) == 2 and not any("keyframe_loss" in row for row in rows)


def test_an_optimizer_state_that_lacks_a_parameter_is_refused(small_run):
    out = small_run().out
    train(small_run(steps=2))
    groups_file = out / LAST.parent / "000002" / "training_state" / "optimizer_param_groups.json"
    groups = json.loads(groups_file.read_text())
    lost = groups[0]["params"].pop()
    groups_file.write_text(json.dumps(groups))
    with pytest.raises(UserError, match=f"no optimizer state for '{lost}'"):
        train(small_run(resume=True, steps=4))


def test_kill_9_while_writing_a_checkpoint_leaves_the_one_before(finished, small_run):
    config = small_run()
    script = """
        import json, os, signal, sys
        from pathlib import Path
        import torch
        torch.set_num_threads(1)
        from vla.training import run_state
        from vla.training.config import _from_json
        from vla.training.loop import train
        write, calls = run_state.save_training_state, []
        def write_or_die(*arguments, **options):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            write(*arguments, **options)
        run_state.save_training_state = write_or_die
        train(_from_json(json.loads(sys.argv[1])))
    """
    arguments = [sys.executable, "-c", textwrap.dedent(script), json.dumps(config.to_json())]
    killed = subprocess.run(arguments, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert os.readlink(config.out / LAST) == "000002"
    assert list((config.out / "checkpoints").glob("*.partial"))
    load_checkpoint(config.out)
    train(small_run(resume=True))
    assert not list((config.out / "checkpoints").glob("*.partial"))
    assert_same_run(config.out, finished)


@pytest.mark.parametrize(
    "full", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("... (os error 28)")]
)
def test_full_disk_keeps_the_last_checkpoint_and_says_so(finished, small_run, monkeypatch, capsys, full):
    config, write = small_run(), run_state.save_training_state

    def fail_at_four(folder, step, *arguments, **options):
        write(folder, step, *arguments, **options)
        if step == 4:
            raise full

    with monkeypatch.context() as patch:
        patch.setattr(run_state, "save_training_state", fail_at_four)
        with pytest.raises(OSError, match="No space") as raised:
            train(config)
    assert raised.value.errno == errno.ENOSPC
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir()) == ["000002", "last"]
    train(small_run(resume=True))
    assert_same_run(config.out, finished)


def test_without_frame_cache_the_run_is_the_same(finished, small_run):
    config = small_run(frame_cache=False)
    train(config)
    assert_same_run(config.out, finished)


def test_steps_may_be_raised_on_resume_without_stretching_the_schedule(finished, small_run):
    config = small_run()
    shutil.copytree(finished, config.out, symlinks=True)
    record = json.loads((config.out / "train.json").read_text())
    record["config"]["out"] = str(config.out)
    (config.out / "train.json").write_text(json.dumps(record))
    train(small_run(resume=True, steps=6))
    rates = [row["lr"] for row in read_metrics(config.out / "metrics.jsonl") if row["kind"] == "train"]
    assert len(rates) == 6
    assert rates[4] == rates[5] < rates[3] < rates[0]


def test_time_limit_stops_at_a_step_boundary_with_a_checkpoint(small_run):
    config = small_run(steps=1000, max_minutes=1e-6)
    train(config)
    assert os.readlink(config.out / LAST) == "000001"


def test_fine_tuning_starts_from_the_checkpoint_and_keeps_its_normalisation(finished, small_run):
    config = small_run(init_from=finished, policy=(), steps=1, lr=1e-30, ema_decay=0.0, augment=False)
    train(config)
    before, after = load_checkpoint(finished), load_checkpoint(config.out)
    for name, value in before.policy.state_dict().items():
        assert torch.equal(value, after.policy.state_dict()[name]), name
    assert after.contract == before.contract
    assert after.manifest["init_from_hash"]


def test_held_out_loss_is_a_mean_over_samples(small_run):
    values = []
    for batch_size in (3, 7):
        config = small_run(batch_size=batch_size, steps=1, lr=1e-30, overwrite=True)
        train(config)
        values.append(losses(config.out, "held_out")[1])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_batch(small_run):
    config = small_run(lr=1e38, steps=10, checkpoint_every=100)
    with pytest.raises(UserError, match="lower --lr"):
        train(config)
    assert "action" in load_file(config.out / "nan_batch.safetensors")


def test_precision_is_measured_once_and_recorded(small_run):
    config = small_run(precision="auto", steps=1)
    train(config)
    record = json.loads((config.out / "train.json").read_text())
    assert record["precision"] == min(record["precision_seconds"], key=record["precision_seconds"].get)
    assert load_checkpoint(config.out).manifest["precision"] == record["precision"]


def test_resume_drops_rows_logged_after_the_checkpoint(finished, small_run):
    config = small_run()
    shutil.copytree(finished, config.out, symlinks=True)
    shutil.rmtree(config.out / "checkpoints" / "000004")
    with (config.out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 5, "lo')  # cut off by a kill
    train(small_run(resume=True))
    assert_same_run(config.out, finished)


BAD = {
    "no dataset": ({"dataset": ()}, "--dataset"),
    "missing dataset": ({"dataset": (Path("nowhere"),)}, "no LeRobotDataset at nowhere"),
    "weights": ({"dataset_weights": (1.0, 2.0)}, "2 entries for 1"),
    "resume nothing": ({"resume": True}, "no training run"),
    "resume and overwrite": ({"resume": True, "overwrite": True}, "choose one"),
    "steps": ({"steps": 0}, "--steps is 0"),
    "learning rate": ({"lr": 0.0}, "--lr is 0.0"),
    "silent dataset": ({"action_space": None}, "--action-space"),
    "action space": ({"action_space": "osc_pose"}, "Did you mean 'osc_pose_delta'"),
    "preset": ({"preset": "nanno"}, "Did you mean 'nano'"),
    "policy field": ({"policy": ("chunk_sise=4",)}, "Did you mean 'chunk_size'"),
    "init_from": ({"init_from": Path("nowhere"), "policy": ()}, "nowhere does not exist"),
}


@pytest.mark.parametrize(("changes", "sentence"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_a_sentence_and_leaves_nothing(small_run, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        train(small_run(**changes))
    assert not (tmp_path / "run").exists()


def test_existing_folders_are_not_touched(finished, small_run, tmp_path):
    with pytest.raises(UserError, match="--resume or replace it with --overwrite"):
        train(small_run(out=finished))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not a training run"):
        train(small_run(overwrite=True))
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_options_that_contradict_the_resumed_run_are_refused(finished, small_run):
    with pytest.raises(UserError, match="started with --seed 0, not 7"):
        train(small_run(out=finished, resume=True, seed=7))


def test_a_run_of_another_release_is_not_resumed(finished, small_run, tmp_path):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    record = json.loads((finished / "train.json").read_text())
    for broken in (
        {name: value for name, value in record.items() if name != "samples_per_step"},
        record | {"config": record["config"] | {"momentum": 0.9}},
    ):
        (tmp_path / "run" / "train.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match="was not written by this release"):
            train(small_run(resume=True))


def edited_copy(root: Path, to: Path, **changes) -> Path:
    shutil.copytree(root, to, ignore=shutil.ignore_patterns(".cache"))
    path = to / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return to


def test_old_format_is_refused_with_the_way_to_convert_it(video_dataset, small_run, tmp_path):
    old = edited_copy(video_dataset, tmp_path / "old", codebase_version="v2.1")
    with pytest.raises(UserError, match="convert_dataset_v21_to_v30"):
        train(small_run(dataset=(old,)))


def test_missing_statistics_are_refused(video_dataset, small_run, tmp_path):
    copy = edited_copy(video_dataset, tmp_path / "copy")
    (copy / "meta" / "stats.json").write_text("{}")
    with pytest.raises(UserError, match="no statistics for action"):
        train(small_run(dataset=(copy,)))


def test_a_dataset_that_does_not_fit_the_checkpoint_is_refused(finished, image_dataset, small_run):
    with pytest.raises(UserError, match=r"camera 'observation.images.image' is missing"):
        train(small_run(dataset=(image_dataset,), init_from=finished, policy=()))
    with pytest.raises(UserError, match="trained at 20 Hz but 10 Hz"):
        train(small_run(control_rate=10.0, init_from=finished, policy=()))
    with pytest.raises(UserError, match=f"commands '{OSC_POSE_DELTA}'"):
        train(small_run(action_space=JOINT_POSITION, init_from=finished, policy=()))


def test_datasets_that_differ_are_not_mixed(video_dataset, image_dataset, small_run):
    with pytest.raises(UserError, match="cannot be mixed: their cameras differ"):
        train(small_run(dataset=(video_dataset, image_dataset)))


def test_command_line_exit_codes(video_dataset, tmp_path, monkeypatch, capsys):
    arguments = ["train", "--out", str(tmp_path / "run"), "--steps", "3", "--batch-size", "2", "--dataset"]
    assert cli.run([*arguments, str(tmp_path)]) == 2
    signal_at_step(monkeypatch, 1)
    options = [str(video_dataset), "--action-space", OSC_POSE_DELTA, "--precision", "float32"]
    assert cli.run([*arguments, *options]) == 130
    assert "--resume" in capsys.readouterr().err
    assert checkpoints.last_checkpoint(tmp_path / "run").name == "000001"


@pytest.mark.slow
def test_nano_trains_in_less_than_4_gb(video_dataset, tmp_path):
    script = (
        "import resource, sys; from vla import cli; code = cli.run(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    options = ["--out", str(tmp_path / "run"), "--steps", "4", "--action-space", OSC_POSE_DELTA]
    done = subprocess.run(
        [sys.executable, "-c", script, "train", "--dataset", str(video_dataset), *options],
        capture_output=True,
        check=True,
    )
    assert int(done.stdout.split()[-1]) < 4 * 2**20  # kB

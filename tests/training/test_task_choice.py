"""``vla train --tasks``: a part of a dataset trains, is held out, normalises and is recorded; no other."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vla import cli
from vla.contract import OSC_POSE_DELTA, PolicyContract
from vla.errors import UserError
from vla.experts.lora_expert import find_expert, load_card
from vla.training.dataset import open_demonstrations
from vla.training.frame_cache import cache_key
from vla.training.loop import train
from vla.training.task_choice import choose_tasks, keep_instructions
from vla.training.trainer import Trainer, split_frames

SOUP, DRAWER = "pick up the soup", "open the drawer"
PRETRAINED = Path("checkpoints/last/pretrained_model")


@pytest.fixture(scope="module")
def whole(video_dataset):
    return open_demonstrations(video_dataset, action_space=OSC_POSE_DELTA)


@pytest.fixture
def seen(monkeypatch):
    """The instructions of all training batches and of all frames of the held-out loss."""
    drawn = {"train": set(), "held_out": set()}
    batch, start = Trainer.batch, Trainer.__init__

    def watched_batch(self, step):
        made = batch(self, step)
        drawn["train"] |= set(made["task"])
        return made

    def watched_start(self, *arguments, **options):
        start(self, *arguments, **options)
        drawn["held_out"] |= set(self.source.batch(self._held_out)["task"])

    monkeypatch.setattr(Trainer, "batch", watched_batch)
    monkeypatch.setattr(Trainer, "__init__", watched_start)
    return drawn


def test_a_part_has_its_own_frames_and_statistics_and_the_wholes_frame_cache(whole):
    (part,) = choose_tasks([whole], ["PICK up*"])
    assert part.chosen_instructions == (SOUP,)
    mine = whole.task == whole.instructions.index(SOUP)
    assert 0 < mine.sum() < len(whole)
    np.testing.assert_array_equal(part.chosen_frames, np.flatnonzero(mine))
    for key, values in (("action", whole.action[mine]), ("observation.state", whole.state[mine])):
        numbers = part.statistics[key]
        assert numbers["count"] == mine.sum()
        np.testing.assert_allclose(numbers["min"], values.min(0), rtol=1e-6)
        np.testing.assert_allclose(numbers["max"], values.max(0), rtol=1e-6)
        np.testing.assert_allclose(numbers["mean"], values.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(numbers["std"], values.std(0), rtol=1e-4)
        assert numbers.keys() == whole.statistics[key].keys()
    assert cache_key(part, 32) == cache_key(whole, 32)


def test_what_is_left_out_is_the_rest(whole):
    (part,), (rest,) = choose_tasks([whole], [SOUP]), choose_tasks([whole], (), [SOUP])
    assert rest.chosen_instructions == (DRAWER,)
    np.testing.assert_array_equal(np.union1d(part.chosen_frames, rest.chosen_frames), np.arange(len(whole)))
    assert choose_tasks([whole]) == [whole] and choose_tasks([whole], ["*"]) == [whole]
    assert keep_instructions(whole, [DRAWER, "unheard of"]).chosen == rest.chosen
    assert keep_instructions(whole, ["unheard of"]) is whole


def test_an_episode_is_held_out_whatever_else_is_trained_on(whole, small_run):
    config = small_run(held_out_samples=10_000)
    (part,) = choose_tasks([whole], [SOUP])
    train_frames, held_out = split_frames(config, [part])
    all_train, all_held_out = split_frames(config, [whole])
    np.testing.assert_array_equal(held_out, np.intersect1d(all_held_out, part.chosen_frames))
    np.testing.assert_array_equal(train_frames[0], np.intersect1d(all_train[0], part.chosen_frames))
    assert len(held_out) and len(train_frames[0])


@pytest.mark.parametrize(
    ("tasks", "without", "sentence"),
    [
        (
            ["pick up the soap"],
            [],
            r"--tasks 'pick up the soap' matches no task .* mean 'pick up the soup'\?",
        ),
        ([], ["close*"], r"--without-tasks 'close\*' matches no task of the dataset"),
        ([SOUP], ["pick*"], r"No task of the dataset at .*video is left to train on"),
    ],
)
def test_a_choice_that_cannot_be_meant_is_refused(whole, tasks, without, sentence):
    with pytest.raises(UserError, match=sentence):
        choose_tasks([whole], tasks, without)


def test_every_dataset_has_to_contribute(whole, video_dataset, tmp_path):
    copy = shutil.copytree(video_dataset, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))
    other = dataclasses.replace(
        open_demonstrations(copy, action_space=OSC_POSE_DELTA),
        instructions=("fold the towel", "wipe the table"),
    )
    both = choose_tasks([whole, other], [SOUP, "wipe*"])
    assert [part.chosen_instructions for part in both] == [(SOUP,), ("wipe the table",)]
    with pytest.raises(UserError, match=r"No task of the dataset at .*copy is left"):
        choose_tasks([whole, other], [SOUP])


def test_a_part_without_statistics_of_its_episodes_is_refused(video_dataset, tmp_path):
    import pyarrow.parquet as parquet

    copy = shutil.copytree(video_dataset, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))
    (file,) = (copy / "meta" / "episodes").rglob("*.parquet")
    table = parquet.read_table(file)
    parquet.write_table(table.drop([name for name in table.column_names if "stats/action/" in name]), file)
    dataset = open_demonstrations(copy, action_space=OSC_POSE_DELTA)
    with pytest.raises(UserError, match="has no statistics of episode 0"):
        choose_tasks([dataset], [SOUP])


def test_a_run_on_a_part_sees_and_records_that_part_alone(small_run, whole, seen, tmp_path):
    train(small_run(tasks=(DRAWER,)))
    assert seen == {"train": {DRAWER}, "held_out": {DRAWER}}
    folder = tmp_path / "run" / PRETRAINED
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["tasks"] == [[DRAWER]] and manifest["recipe"]["tasks"] == [DRAWER]
    (part,) = choose_tasks([whole], [DRAWER])
    mine = whole.action[part.chosen_frames]
    np.testing.assert_allclose(
        PolicyContract.load(folder).statistics["action"]["max"], mine.max(0), rtol=1e-6
    )
    train(
        small_run(
            out=tmp_path / "expert", expert="soup", base=tmp_path / "run", policy=(), without_tasks=(DRAWER,)
        )
    )
    assert load_card(find_expert(tmp_path / "expert")).instructions == (SOUP,)


def test_a_part_is_resumed_as_it_was_chosen(small_run, seen, tmp_path):
    config = small_run(out=tmp_path / "straight", tasks=("pick*",))
    train(config)
    train(dataclasses.replace(config, out=tmp_path / "halted", steps=2, schedule_steps=4))
    seen["train"].clear()
    resumed = small_run(out=tmp_path / "halted", resume=True, steps=4)
    train(resumed)
    assert seen["train"] == {SOUP}
    a, b = (load_file(tmp_path / run / PRETRAINED / "model.safetensors") for run in ("straight", "halted"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(UserError, match=r"was started with --tasks \('pick\*',\), not \('open\*',\)"):
        train(dataclasses.replace(resumed, tasks=("open*",)))


def test_runs_of_earlier_releases_are_resumed_on_everything(small_run, seen, tmp_path):
    train(small_run(steps=2, schedule_steps=4))
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    del record["config"]["tasks"], record["config"]["without_tasks"]
    (tmp_path / "run" / "train.json").write_text(json.dumps(record))
    seen["train"].clear()
    train(small_run(resume=True, steps=4))
    assert seen["train"] == {SOUP, DRAWER}


def test_the_command_says_what_it_does_not_find(video_dataset, tmp_path, capsys):
    line = [
        "train",
        f"--dataset={video_dataset}",
        "--action-space=osc_pose_delta",
        f"--out={tmp_path / 'run'}",
    ]
    assert cli.run([*line, "--tasks", "open the door", "--device=cpu"]) == cli.EXIT_USER_ERROR
    assert "Did you mean 'open the drawer'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

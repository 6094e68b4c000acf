"""The experiment trackers themselves, offline: what `vla train --logger` shows is what metrics.jsonl says."""

import importlib
import json
import sys

import pytest

from vla.errors import UserError
from vla.training.loop import train
from vla.training.metrics import MetricsLog, read_metrics


def losses(config) -> dict[int, float]:
    rows = read_metrics(config.out / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


@pytest.mark.slow
def test_trackio_has_the_rows_of_a_run_and_of_its_continuation(small_run, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    config = small_run(steps=2, logger="trackio")
    train(config)
    train(small_run(resume=True, steps=4, logger="trackio"))
    from trackio.sqlite_storage import SQLiteStorage

    run_id = json.loads((config.out / "train.json").read_text())["run_id"]
    logged = SQLiteStorage.get_logs("cogmerge", f"run-{run_id[:8]}")
    shown = {row["step"]: row["train/loss"] for row in logged if "train/loss" in row}
    assert shown == pytest.approx(losses(config))
    assert sorted(shown) == [1, 2, 3, 4]
    assert {row["step"] for row in logged if "held_out/loss" in row} == {2, 4}


@pytest.mark.slow
def test_wandb_writes_offline_into_the_folder_of_the_run(small_run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = small_run(steps=2, logger="wandb")
    train(config)
    importlib.import_module("wandb").teardown()  # its service writes the last rows when it ends
    run_id = json.loads((config.out / "train.json").read_text())["run_id"]
    (file,) = (config.out / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
    content = file.read_bytes()
    assert b"train/loss" in content and b"held_out/loss" in content
    assert all(repr(value).encode() in content for value in losses(config).values())


def test_a_tracker_that_is_not_installed_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="needs the package trackio: pip install trackio"):
        MetricsLog(tmp_path, 0, tracker="trackio")

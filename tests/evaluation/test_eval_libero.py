"""`vla eval` from outside: the untrained nano checkpoint in the real simulator."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from untrained_checkpoint import save_untrained_nano

from vla.evaluation.policy_source import CheckpointSource
from vla.evaluation.records import read_records
from vla.evaluation.rollout import make_simulation
from vla.evaluation.run import EvalConfig, evaluate_source
from vla.sim import LiberoSimulation, benchmark_episode

LIMIT_MB = 2000  # an evaluation worker stays under 2 GB


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_untrained_nano(tmp_path_factory.mktemp("run") / "pretrained_model")


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """Two episodes of one task, started from the command line, with one film."""
    out = tmp_path_factory.mktemp("evaluation") / "out"
    options = ["--tasks=3", "--init-states=0-1", "--workers=1", "--max-steps=20", "--videos=failures"]
    options += ["--max-videos=1"]
    command = [sys.executable, "-m", "vla.cli", "eval", "--checkpoint", checkpoint, "--out", out, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_the_command_measures_a_checkpoint(finished):
    out, printed = finished
    rows = read_records(out)
    assert [(row.task, row.init_state, row.status, row.steps, row.queries) for row in rows] == [
        (3, 0, "failure", 20, 3),
        (3, 1, "failure", 20, 3),
    ]
    assert "0/2" in printed and str(out / "report.html") in printed.replace("\n", "")
    assert json.loads((out / "summary.json").read_text())["provenance"]["step_limits"] == {
        "libero_object": 20
    }


def test_a_worker_stays_under_two_gigabytes(finished):
    assert max(row.worker_rss_mb for row in read_records(finished[0])) < LIMIT_MB


def test_the_report_shows_a_film_and_the_routers(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 1
    assert "into the decoder" in page and "32 of 32 tokens" in page


def test_an_episode_alone_is_the_episode_in_a_batch(finished, checkpoint, tmp_path):
    """The second episode, without the first in its process and simulation."""
    config = EvalConfig(
        checkpoint=checkpoint,
        tasks="3",
        init_states="1",
        workers=1,
        max_steps=20,
        videos="none",
        out=tmp_path,
    )
    source = CheckpointSource.open(checkpoint)
    evaluate_source(config, source)
    (alone,), batch = read_records(tmp_path), read_records(finished[0])[1]
    timing = {"wall_s": 0, "policy_s": 0, "worker_rss_mb": 0}
    assert replace(alone, **timing) == replace(batch, **timing)


@pytest.mark.slow
def test_two_workers_and_two_tasks_repeat_one_worker(checkpoint, tmp_path):
    """Bit by bit: the films of all episodes are the same files, whoever ran them in whatever order."""
    films = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        config = EvalConfig(
            tasks="0,4", init_states="0-1", workers=workers, max_steps=40, videos="all", max_videos=4, out=out
        )
        evaluate_source(config, CheckpointSource.open(checkpoint))
        films.append({path.name: path.read_bytes() for path in (out / "videos").iterdir()})
    assert len(films[0]) == 4 and films[0] == films[1]


def test_dropping_uploaded_textures_changes_no_pixel(simulation_factory):
    """`make_simulation` gives memory back; the frames are those of a simulation that keeps it."""
    simulation_factory.close()
    episode = benchmark_episode("libero_object", 3, 0)
    frames = []
    for make in (LiberoSimulation, make_simulation):
        with make("libero_object", 3, image_size=128) as simulation:
            simulation.reset(episode)
            simulation.step(np.array([0.5, 0.2, -0.5, 0.1, 0.0, 0.2, 1.0]))
            frames.append(simulation.images())
    assert all(np.array_equal(frames[0][name], frames[1][name]) for name in frames[0])

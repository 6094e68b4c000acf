"""`vla collect`: what it writes, that it survives kills, and that its schedule wastes nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.contract import Interface
from vla.errors import UserError
from vla.sim import sim_interface
from vla.sim.collection import CollectConfig, collect
from vla.sim.collection_workers import AttemptSchedule
from vla.sim.recording import Recording, render

VLA = Path(sys.executable).with_name("vla")
SIZE = 64
ARGUMENTS = ["--suite", "libero_object", "--tasks", "0,2", "--image-size", str(SIZE)]


def command(out, *more, episodes=1):
    return [str(VLA), "collect", *ARGUMENTS, f"--episodes-per-task={episodes}", "--out", str(out), *more]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """A small collection, recorded without interruption by one worker."""
    return collected(tmp_path_factory.mktemp("collect") / "demo")


def collected(out: Path, episodes: int = 1) -> Path:
    subprocess.run(command(out, "--workers", "1", episodes=episodes), check=True, timeout=600)
    return out


# ---------------------------------------------------------------------- what is written


def test_lerobot_reads_the_dataset(dataset):
    from lerobot.datasets import LeRobotDataset

    data = LeRobotDataset("local/demo", root=dataset)
    assert (data.num_episodes, data.fps, len(data.meta.tasks)) == (2, 20, 2)
    for episode in data.meta.episodes:
        item = data[episode["dataset_to_index"] - 1]
        assert item["task"] == episode["tasks"][0]
        assert item["observation.images.image"].shape == (3, SIZE, SIZE)
        assert item["observation.state"].shape == (8,)
        assert int(item["frame_index"]) == episode["length"] - 1


def test_dataset_offers_the_interface_of_the_simulator(dataset):
    info = json.loads((dataset / "meta" / "info.json").read_text())
    assert Interface.from_dataset(info) == sim_interface(SIZE)


def test_provenance_and_contact_sheet(dataset):
    provenance = json.loads((dataset / "meta" / "cogmerge.json").read_text())
    assert provenance["suite"] == "libero_object" and provenance["action_space"] == "osc_pose_delta"
    assert [(task["task"], len(task["kept"])) for task in provenance["tasks"]] == [(0, 1), (2, 1)]
    assert (dataset / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")
    assert not dataset.with_name("demo.partial").exists()


def test_statistics_are_those_of_all_frames(dataset):
    stats = json.loads((dataset / "meta" / "stats.json").read_text())
    rows = np.array(pq.read_table(dataset / "data/chunk-000/file-000.parquet")["action"].to_pylist())
    np.testing.assert_allclose(stats["action"]["mean"], rows.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(stats["action"]["std"], rows.std(axis=0), atol=1e-6)
    np.testing.assert_allclose(stats["action"]["q99"], np.quantile(rows, 0.99, axis=0), atol=0.02)
    frames = np.concatenate([video_frames(path) for path in videos(dataset, "image")]) / 255
    image = stats["observation.images.image"]
    np.testing.assert_allclose(np.ravel(image["mean"]), frames.mean(axis=(0, 1, 2)), atol=0.01)
    assert np.shape(image["q50"]) == (3, 1, 1)


def test_frames_can_be_drawn_again_identically(dataset, simulation_factory):
    """Drawing from the recorded states shows what a live replay of the actions shows."""
    recording = Recording.load(dataset / "simulator" / "episode_000000.safetensors")
    encoded = video_frames(videos(dataset, "image")[0])
    sim = simulation_factory("libero_object", 0, image_size=SIZE)
    drawn = list(render(recording, sim))
    assert len(drawn) == len(recording.executed)
    sim.reset(recording.episode)
    for step, action in enumerate(recording.executed):
        np.testing.assert_array_equal(sim.sim_state(), recording.states[step])
        if step % 20 == 0:
            for name, image in sim.images().items():
                np.testing.assert_array_equal(image, drawn[step][name])
        error = drawn[step]["image"].astype(float) - encoded[step]
        assert 10 * np.log10(255**2 / np.mean(error**2)) > 28  # and the video shows the same moment
        success = sim.step(action)
    assert success


def test_frames_can_be_drawn_at_another_size(dataset, simulation_factory):
    recording = Recording.load(dataset / "simulator" / "episode_000001.safetensors")
    sim = simulation_factory("libero_object", 2, image_size=96)
    assert next(render(recording, sim))["image2"].shape == (96, 96, 3)


def test_parquet_holds_what_the_simulator_held(dataset, simulation_factory):
    recordings = [Recording.load(path) for path in sorted(dataset.glob("simulator/episode_*.safetensors"))]
    table = pq.read_table(dataset / "data/chunk-000/file-000.parquet").to_pydict()
    sim = simulation_factory("libero_object", 2, image_size=96)
    sim.set_sim_state(recordings[1].states[7])
    row = table["episode_index"].index(1) + 7
    np.testing.assert_array_equal(sim.state(), np.float32(table["observation.state"][row]))
    clean = np.array(table["action"], np.float32)
    executed = np.concatenate([recording.executed for recording in recordings]).astype(np.float32)
    moved = np.any(clean != executed, axis=1)
    assert 0 < moved.mean() < 1  # noise in bursts; labels stay clean
    np.testing.assert_array_equal(clean[:, 6], executed[:, 6])


# ---------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("episodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_collection_equals_an_uninterrupted_one(dataset, tmp_path, episodes):
    expected = dataset if episodes == 1 else collected(tmp_path / "whole", episodes)
    out = tmp_path / "demo"
    partial = out.with_name("demo.partial")

    def attempts():
        return list(partial.glob("attempts/*/attempt_*"))

    with running(out, episodes) as run:
        wait_until(attempts)
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130 and not out.exists()

    done = len(attempts())
    with running(out, episodes, "--resume") as run:
        wait_until(lambda: children(run.pid) and len(attempts()) >= done + episodes - 1)
        workers = children(run.pid)
        run.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))

    with running(out, episodes, "--resume") as run:
        wait_until(lambda: children(run.pid))
        os.kill(children(run.pid)[0], signal.SIGKILL)  # a worker that dies is replaced
        assert run.wait(600) == 0
    assert_same_dataset(expected, out)
    again = subprocess.run(
        command(out, "--resume", episodes=episodes), capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0 and "complete already" in again.stdout


@contextmanager
def running(out: Path, episodes: int, *more: str):
    run = subprocess.Popen(command(out, "--workers", "2", *more, episodes=episodes))
    try:
        yield run
    finally:
        run.kill()
        run.wait()


def assert_same_dataset(expected: Path, actual: Path) -> None:
    files = sorted(path.relative_to(expected) for path in expected.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(actual) for path in actual.rglob("*") if path.is_file())
    for path in files:
        if path.suffix in (".safetensors", ".parquet", ".json"):
            assert (expected / path).read_bytes() == (actual / path).read_bytes(), path
        elif path.suffix == ".mp4":
            np.testing.assert_array_equal(video_frames(expected / path), video_frames(actual / path))


# ---------------------------------------------------------------------- refusals


def test_existing_output_is_refused(dataset):
    before = sorted(dataset.rglob("*"))
    with pytest.raises(UserError, match="exists already"):
        collect(CollectConfig("libero_object", dataset, episodes_per_task=1))
    with pytest.raises(UserError, match="recorded with another seed"):
        collect(CollectConfig("libero_object", dataset, image_size=SIZE, seed=1, resume=True))
    assert sorted(dataset.rglob("*")) == before


def test_overwrite_touches_only_datasets(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not a dataset"):
        collect(CollectConfig("libero_object", tmp_path, overwrite=True))
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_interrupted_collection_is_not_mistaken_for_nothing(tmp_path):
    (tmp_path / "demo.partial").mkdir()
    with pytest.raises(UserError, match="--resume"):
        collect(CollectConfig("libero_object", tmp_path / "demo"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"suite": "libero_objects"}, "Did you mean 'libero_object'"),
        ({"tasks": "10"}, "libero_object has no task 10; there are 0 to 9"),
        ({"tasks": "one"}, "'one' is not a selection"),
        ({"episodes_per_task": 0}, "--episodes-per-task must be at least 1"),
        ({"workers": 0}, "--workers must be at least 1"),
    ],
)
def test_bad_settings(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        collect(CollectConfig(**{"suite": "libero_object", "out": tmp_path / "demo"} | changes))
    assert not any(tmp_path.iterdir())


def test_foreign_recording_is_refused(tmp_path):
    path = tmp_path / "episode.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a recorded simulator trajectory"):
        Recording.load(path)


# ---------------------------------------------------------------------- the schedule


@settings(max_examples=300)
@given(
    outcomes=st.lists(st.booleans(), min_size=30, max_size=30),
    wanted=st.integers(1, 6),
    workers=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    kill_after=st.integers(0, 12),
)
def test_attempts_do_not_depend_on_workers_timing_or_kills(outcomes, wanted, workers, seed, kill_after):
    alone = play(outcomes, wanted, 1, random.Random(0))
    assert play(outcomes, wanted, workers, random.Random(seed)) == alone
    killed = play(outcomes, wanted, workers, random.Random(seed), stop_after=kill_after)
    assert play(outcomes, wanted, workers, random.Random(seed + 1), known=killed) == alone
    assert sum(alone.values()) <= wanted


def play(outcomes, wanted, workers, rng, known=None, stop_after=None) -> dict[int, bool]:
    """Run a schedule with workers that finish in random order; return the outcomes recorded."""
    schedule = AttemptSchedule(wanted, len(outcomes), known or {})
    running: list[int] = []
    while stop_after is None or len(schedule.outcomes) < stop_after:
        while len(running) < workers and (attempt := schedule.next()) is not None:
            running.append(attempt)
        if not running:
            break
        attempt = running.pop(rng.randrange(len(running)))
        schedule.finish(attempt, outcomes[attempt])
    return schedule.outcomes


# ---------------------------------------------------------------------- helpers


def videos(dataset: Path, camera: str) -> list[Path]:
    return sorted((dataset / "videos" / f"observation.images.{camera}").rglob("*.mp4"))


def video_frames(path: Path) -> np.ndarray:
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def children(pid: int) -> list[int]:
    """Worker processes of a collection (its resource tracker is not one)."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [
        int(child) for child in text.split() if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def wait_until(condition, timeout=400.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.05)

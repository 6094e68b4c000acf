import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import psutil
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from vla.contract import OSC_POSE_DELTA
from vla.errors import UserError
from vla.policy.processor_cogmerge import ResizeImagesStep
from vla.training import frame_cache
from vla.training.dataset import open_demonstrations
from vla.training.frame_cache import FrameCache, LiveFrames, open_frame_cache


@pytest.fixture(params=["video_dataset", "image_dataset"])
def root(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("size", [32, 24, 64])
def test_cached_frames_equal_the_preprocessor_on_the_original_frames(root, size, tmp_path):
    dataset = open_demonstrations(root, action_space=OSC_POSE_DELTA)
    cache = open_frame_cache(dataset, size, folder=tmp_path, quiet=True)
    original = LeRobotDataset(root.name, root=root, video_backend="pyav")
    resize = ResizeImagesStep(size=size)
    assert set(cache.cameras) == set(original.meta.camera_keys)
    frames = np.arange(0, len(dataset), 3)
    for key, images in cache.gather(frames).items():
        for frame, image in zip(frames, images, strict=True):
            expected = resize.observation({key: original[int(frame)][key][None]})[key][0]
            actual = resize.observation({key: torch.from_numpy(image).permute(2, 0, 1)[None]})[key][0]
            assert torch.equal(actual, expected), (key, frame)


def test_live_frames_equal_cached_frames(root, tmp_path):
    dataset = open_demonstrations(root, action_space=OSC_POSE_DELTA)
    frames = np.array([7, 0, 7, len(dataset) - 1])
    cached = open_frame_cache(dataset, 32, folder=tmp_path, quiet=True).gather(frames)
    live = LiveFrames(dataset, 32).gather(frames)
    assert cached.keys() == live.keys()
    for key in cached:
        np.testing.assert_array_equal(cached[key], live[key])


def test_default_place_is_in_the_dataset_and_is_reused(video_dataset, tmp_path, monkeypatch):
    own = shutil.copytree(video_dataset, tmp_path / "own", ignore=shutil.ignore_patterns(".cache"))
    dataset = open_demonstrations(own, action_space=OSC_POSE_DELTA)
    open_frame_cache(dataset, 16, quiet=True)
    (folder,) = (own / ".cache").glob("frames-*[0-9a-f]")
    assert json.loads((folder / "frames.json").read_text())["cameras"]
    monkeypatch.setattr(frame_cache, "_build", lambda *arguments: pytest.fail("built twice"))
    open_frame_cache(dataset, 16, quiet=True)


def test_key_follows_size_and_content(video_dataset, image_dataset):
    first = open_demonstrations(video_dataset, action_space=OSC_POSE_DELTA)
    second = open_demonstrations(image_dataset, action_space=OSC_POSE_DELTA)
    keys = {
        frame_cache.cache_key(first, 16),
        frame_cache.cache_key(first, 32),
        frame_cache.cache_key(second, 16),
    }
    assert len(keys) == 3


def test_killed_build_continues_where_it_stopped(video_dataset, tmp_path):
    script = f"""
        import os, signal
        from vla.training import frame_cache
        from vla.training.dataset import open_demonstrations
        write, calls = frame_cache.write_text, []
        def write_then_die(path, text):
            write(path, text)
            calls.append(path)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        frame_cache.write_text = write_then_die
        from pathlib import Path
        dataset = open_demonstrations(Path({str(video_dataset)!r}), action_space="osc_pose_delta")
        frame_cache.open_frame_cache(dataset, 32, folder=Path({str(tmp_path)!r}), quiet=True)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    (partial,) = tmp_path.glob("*.partial")
    done = sum(int(path.read_text()) for path in partial.glob("*.progress"))
    dataset = open_demonstrations(video_dataset, action_space=OSC_POSE_DELTA)
    assert 0 < done < 2 * len(dataset)

    decoded = []
    original = frame_cache._decode_range
    frame_cache._decode_range = lambda d, k, a, b: decoded.append(b - a) or original(d, k, a, b)
    try:
        cache = open_frame_cache(dataset, 32, folder=tmp_path, quiet=True)
    finally:
        frame_cache._decode_range = original
    assert sum(decoded) == 2 * len(dataset) - done
    frames = np.arange(len(dataset))
    fresh = LiveFrames(dataset, 32).gather(frames)
    for key, images in cache.gather(frames).items():
        np.testing.assert_array_equal(images, fresh[key])
    assert not list(tmp_path.glob("*.partial"))


def test_memory_stays_bounded_on_a_cache_larger_than_the_limit(tmp_path):
    shape = (12_000, 256, 256, 3)  # 2.4 GB, sparse
    (tmp_path / "frames.json").write_text(json.dumps({"cameras": {"observation.images.image": shape}}))
    with (tmp_path / "observation.images.image.uint8").open("wb") as file:
        os.truncate(file.fileno(), int(np.prod(shape)))
    cache, process = FrameCache(tmp_path), psutil.Process()
    before, highest = process.memory_info().rss, 0
    for start in range(0, shape[0], 64):
        cache.gather(np.arange(start, min(start + 64, shape[0])))
        highest = max(highest, process.memory_info().rss)
    assert highest - before < 1.0e9


def test_too_small_a_disk_is_refused_before_decoding(video_dataset, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(frame_cache.shutil, "disk_usage", lambda path: usage)
    dataset = open_demonstrations(video_dataset, action_space=OSC_POSE_DELTA)
    with pytest.raises(UserError, match="--cache-dir"):
        open_frame_cache(dataset, 32, folder=tmp_path, quiet=True)


def test_damaged_video_is_a_sentence(video_dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(video_dataset, copy, ignore=shutil.ignore_patterns(".cache"))
    video = next((copy / "videos").rglob("*.mp4"))
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    dataset = open_demonstrations(copy, action_space=OSC_POSE_DELTA)
    with pytest.raises(UserError, match=r"video .* cannot be decoded"):
        open_frame_cache(dataset, 32, folder=tmp_path / "cache", quiet=True)

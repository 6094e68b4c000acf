"""Recorded demonstrations become a dataset that LeRobot reads, however long their videos are together."""

import json

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from safetensors.numpy import save_file

from vla.sim import dataset as assembly
from vla.sim.recording import ATTEMPT_FILE, FRAMES_FILE, SIMULATOR_FILE, _encode
from vla.sim.worlds import world_of

SIZE = 64
LENGTHS = (9, 12, 8, 10)


def record(folder, number, length):
    """One demonstration on disk, as a collection worker leaves it: every frame has its own grey."""
    folder.mkdir(parents=True)
    world = world_of("so101_tabletop")
    greys = 20 * number + 2 * np.arange(length)
    names = [camera.key.rsplit(".", 1)[-1] for camera in world.interface(SIZE).cameras]
    frames = ({name: np.full((SIZE, SIZE, 3), grey, np.uint8) for name in names} for grey in greys)
    histograms = _encode(frames, folder, assembly.video_settings(25))
    state = np.full((length, 6), number, np.float32)
    tensors = {"state": state, "action": state} | {f"histogram.{k}": v for k, v in histograms.items()}
    save_file(tensors, folder / FRAMES_FILE)
    (folder / ATTEMPT_FILE).write_text(json.dumps({"language": "pick up the cube"}))
    (folder / SIMULATOR_FILE).write_bytes(b"")
    return folder


@pytest.mark.parametrize(("seconds", "files"), [(900.0, 1), (0.8, 3), (0.1, 4)])
def test_videos_stay_short_enough_for_lerobot(tmp_path, monkeypatch, seconds, files):
    monkeypatch.setattr(assembly, "LONGEST_VIDEO", seconds)
    folders = [record(tmp_path / f"a{k}", k, length) for k, length in enumerate(LENGTHS)]
    root = tmp_path / "dataset"
    assembly.assemble([folders], world_of("so101_tabletop"), SIZE, {}, root, "cogmerge/test")
    assert len(list((root / "videos" / "observation.images.top").rglob("*.mp4"))) == files
    dataset = LeRobotDataset("cogmerge/test", root=root, video_backend="pyav")
    expected = [(k, 20 * k + 2 * t) for k, length in enumerate(LENGTHS) for t in range(length)]
    assert len(dataset) == len(expected)
    for index, (number, grey) in enumerate(expected):
        item = dataset[index]
        assert item["observation.state"][0] == number
        assert abs(item["observation.images.top"].mean().item() * 255 - grey) < 1.5

"""Tiny LeRobot datasets, written by LeRobot itself, and a tiny policy to train on them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs import RGBEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from vla.contract import OSC_POSE_DELTA
from vla.training.config import TrainConfig

CAMERAS = ("observation.images.image", "observation.images.image2")
TASKS = ("pick up the soup", "open the drawer")

#: The nano architecture, smaller still, so that a step of a test takes milliseconds.
SMALL = (
    "image_size=32",
    "stem_strides=[8]",
    "stem_width=8",
    "vision_dim=16",
    "vision_layers=1",
    "vision_heads=2",
    "aggregation_tokens=4",
    "hidden_size=32",
    "intermediate_size=32",
    "decoder_layers=2",
    "decoder_heads=2",
    "decoder_kv_heads=2",
)


def write_dataset(root: Path, *, dtype="video", lengths=(12, 9, 11, 10), size=64, cameras=CAMERAS, fps=20):
    """A dataset of smooth random films; the gripper closes in the middle of every episode."""
    features = {
        key: {"dtype": dtype, "shape": (size, size, 3), "names": ["height", "width", "channels"]}
        for key in cameras
    }
    features["observation.state"] = {"dtype": "float32", "shape": (8,), "names": None}
    features["action"] = {"dtype": "float32", "shape": (7,), "names": None}
    dataset = LeRobotDataset.create(
        root.name,
        fps=fps,
        features=features,
        root=root,
        use_videos=dtype == "video",
        rgb_encoder=RGBEncoderConfig(vcodec="h264", preset="ultrafast", g=2) if dtype == "video" else None,
    )
    generator = np.random.default_rng(0)
    for episode, length in enumerate(lengths):
        coarse = generator.integers(0, 256, (len(cameras), size // 8, size // 8, 3))
        for step in range(length):
            frame = {
                key: np.kron(np.roll(image, step, 1), np.ones((8, 8, 1))).astype(np.uint8)
                for key, image in zip(cameras, coarse, strict=True)
            }
            action = np.tanh(generator.normal(size=7)).astype(np.float32)
            action[6] = 1.0 if step >= length // 2 else -1.0
            frame |= {"observation.state": generator.normal(size=8).astype(np.float32), "action": action}
            dataset.add_frame(frame | {"task": TASKS[episode % 2]})
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="session")
def video_dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "video")


@pytest.fixture(scope="session")
def image_dataset(tmp_path_factory) -> Path:
    """Another camera name, another size, as images in parquet: a dataset made elsewhere."""
    return write_dataset(
        tmp_path_factory.mktemp("data") / "image",
        dtype="image",
        lengths=(70, 5),
        size=48,
        cameras=("observation.images.front",),
    )


@pytest.fixture(autouse=True)
def one_thread():
    """Losses are compared bit for bit; the number of threads changes the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def small_config(video_dataset):
    """Make a `TrainConfig` for a few quick steps into `out`; keyword arguments override."""

    def make(out: Path, **changes) -> TrainConfig:
        settings = {
            "out": out,
            "dataset": (video_dataset,),
            "action_space": OSC_POSE_DELTA,
            "policy": SMALL,
            "steps": 4,
            "batch_size": 4,
            "log_every": 1,
            "eval_every": 2,
            "checkpoint_every": 2,
            "held_out": 0.5,
            "precision": "float32",
            "device": "cpu",
        }
        return TrainConfig(**settings | changes)

    return make


@pytest.fixture
def small_run(small_config, tmp_path):
    """`small_config` with the folder of this test's run."""
    return lambda **changes: small_config(changes.pop("out", tmp_path / "run"), **changes)

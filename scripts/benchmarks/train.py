"""Training throughput of nano: `vla train` with and without its frame cache, and lerobot-train's loop.

All three train the same network on the same dataset on the same cores, at the same batch size, precision and
number of threads. `vla train` also augments and averages the weights; lerobot-train does neither.
The dataset is made up here (two 256x256 cameras, LeRobot's own video encoder) unless a folder is given.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.sampler import EpisodeAwareSampler
from lerobot.scripts.lerobot_train import update_policy
from lerobot.utils.logging_utils import AverageMeter, MetricsTracker
from lerobot.utils.utils import cycle

from vla.contract import OSC_POSE_DELTA
from vla.training.allocator import keep_freed_memory
from vla.training.batches import BatchSource
from vla.training.config import TrainConfig
from vla.training.dataset import open_demonstrations
from vla.training.frame_cache import LiveFrames, open_frame_cache
from vla.training.policy_setup import start_policy
from vla.training.precision import time_precisions
from vla.training.trainer import Trainer

BATCH_SIZE = 64
WARM_UP = 2
ROUNDS, STEPS = 3, 8
"""The figures are medians over rounds of so many steps."""


def run(dataset: Path | None = None) -> list[dict[str, Any]]:
    """Measure and return rows of name, value, unit, baseline, baseline_value, ratio."""
    with tempfile.TemporaryDirectory() as folder:
        root = dataset or write_dataset(Path(folder) / "dataset")
        cached, precision, parts = measure_ours(root, Path(folder), frame_cache=True)
        live, _, _ = measure_ours(root, Path(folder), frame_cache=False, precision=precision)
        # LeRobot gets the faster of no workers and two; its default of four is slower on two cores.
        lerobot, workers = max(
            (measure_lerobot(root, Path(folder), precision, workers), workers) for workers in (0, 2)
        )
    baseline = f"lerobot-train loop, {workers} workers"
    rows = [
        _row(f"vla train, frame cache ({precision})", cached, baseline, lerobot),
        _row(f"vla train, no frame cache ({precision})", live, baseline, lerobot),
    ]
    for name, seconds in parts.items():
        share = seconds * cached / BATCH_SIZE
        rows.append(
            {
                "name": f"  of a step: {name}",
                "value": 1e3 * seconds,
                "unit": "ms",
                "baseline": "step",
                "baseline_value": 1e3 * BATCH_SIZE / cached,
                "ratio": share,
            }
        )
    return rows


def measure_ours(
    root: Path, folder: Path, *, frame_cache: bool, precision: str | None = None
) -> tuple[float, str, dict[str, float]]:
    """Return samples per second, the precision and the seconds per step of each part."""
    keep_freed_memory()
    trainer = _trainer(root, folder, frame_cache)
    if precision is None:
        batch = trainer.preprocess(trainer.batch(0))
        seconds = time_precisions(
            lambda: trainer.policy(batch)[0], trainer.policy, trainer.accelerator.device
        )
        precision = min(seconds, key=seconds.get)
    trainer.precision = precision
    parts = {"batch and augmentation": 0.0, "preprocessor": 0.0, "update": 0.0}

    def step(index: int) -> None:
        marks = [time.perf_counter()]
        raw = trainer.batch(index)
        marks.append(time.perf_counter())
        batch = trainer.preprocess(raw)
        marks.append(time.perf_counter())
        trainer.update(batch)
        marks.append(time.perf_counter())
        if index >= WARM_UP:
            for name, seconds in zip(parts, np.diff(marks).tolist(), strict=True):
                parts[name] += seconds / (ROUNDS * STEPS)

    return _samples_per_second(step), precision, parts


def measure_lerobot(root: Path, folder: Path, precision: str, workers: int) -> float:
    """Samples per second of lerobot-train's own `update_policy`, data loader and preprocessor."""
    trainer = _trainer(root, folder, frame_cache=False)  # for the same policy, optimizer and schedule
    meta = trainer.datasets[0].meta
    dataset = LeRobotDataset(
        root.name,
        root=root,
        delta_timestamps=resolve_delta_timestamps(trainer.policy.config, meta),
        return_uint8=True,
    )
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=BATCH_SIZE,
        sampler=EpisodeAwareSampler(
            meta.episodes["dataset_from_index"], meta.episodes["dataset_to_index"], shuffle=True
        ),
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,
    )
    batches = cycle(loader)
    meters = {name: AverageMeter(name) for name in ("loss", "grad_norm", "lr", "update_s")}
    tracker = MetricsTracker(BATCH_SIZE, len(dataset), dataset.num_episodes, meters)

    def step(index: int) -> None:
        batch = next(batches)
        for key in meta.camera_keys:
            batch[key] = batch[key].to(torch.float32) / 255.0
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            update_policy(
                tracker,
                trainer.policy,
                trainer.start.preprocessor(batch),
                trainer.optimizer,
                trainer.grad_clip,
                trainer.accelerator,
                trainer.scheduler,
            )

    return _samples_per_second(step)


def write_dataset(root: Path, episodes: int = 6, length: int = 60, size: int = 256) -> Path:
    """Write smooth random films of two cameras with LeRobot and its default encoder."""
    features = {
        f"observation.images.{name}": {"dtype": "video", "shape": (size, size, 3), "names": None}
        for name in ("image", "image2")
    }
    features["observation.state"] = {"dtype": "float32", "shape": (8,), "names": None}
    features["action"] = {"dtype": "float32", "shape": (7,), "names": None}
    dataset = LeRobotDataset.create(root.name, fps=20, features=features, root=root)
    generator = np.random.default_rng(0)
    for _ in range(episodes):
        coarse = generator.integers(0, 256, (2, size // 16, size // 16, 3))
        for step in range(length):
            moved = np.kron(np.roll(coarse, step // 4, 1), np.ones((1, 16, 16, 1))).astype(np.uint8)
            frame = dict(zip(list(features)[:2], moved, strict=True))
            frame["observation.state"] = generator.normal(size=8).astype(np.float32)
            frame["action"] = np.tanh(generator.normal(size=7)).astype(np.float32)
            dataset.add_frame(frame | {"task": "pick up the soup and place it in the basket"})
        dataset.save_episode()
    dataset.finalize()
    return root


def _trainer(root: Path, folder: Path, frame_cache: bool) -> Trainer:
    config = TrainConfig(
        out=folder / "run", dataset=(root,), action_space=OSC_POSE_DELTA, batch_size=BATCH_SIZE
    )
    datasets = [open_demonstrations(root, action_space=config.action_space) for root in config.dataset]
    start = start_policy(config, datasets, "cpu")
    size = start.policy.config.image_size
    frames = (
        [open_frame_cache(dataset, size, folder=folder) for dataset in datasets]
        if frame_cache
        else [LiveFrames(dataset, size) for dataset in datasets]
    )
    source = BatchSource(datasets, frames, start.policy.config.action_delta_indices)
    return Trainer(config, datasets, source, start, Accelerator(cpu=True))


def _samples_per_second(step: Callable[[int], None]) -> float:
    for index in range(WARM_UP):
        step(index)
    rates = []
    for round_ in range(ROUNDS):
        begin = time.perf_counter()
        for index in range(STEPS):
            step(WARM_UP + round_ * STEPS + index)
        rates.append(STEPS * BATCH_SIZE / (time.perf_counter() - begin))
    return float(np.median(rates))


def _row(name: str, value: float, baseline: str, baseline_value: float) -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "unit": "samples/s",
        "baseline": baseline,
        "baseline_value": baseline_value,
        "ratio": value / baseline_value,
    }

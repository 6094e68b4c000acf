"""``vla bank fit-probe``: the probe router's frames from datasets, its features cached, and the fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from vla.errors import UserError, nearest
from vla.evaluation.task_routed import holds_experts, load_experts
from vla.experts.multi_expert import MultiExpertPolicy, Observation
from vla.experts.task_routers.probe import fit_probe, load_features, save_features
from vla.training.dataset import Demonstrations, open_demonstrations
from vla.training.frame_cache import LiveFrames
from vla.training.task_choice import keep_instructions


@dataclass(frozen=True)
class FitProbeConfig:
    """Fit the probe router of a bank or merge; only experts whose frames are not cached need a dataset."""

    experts: Annotated[Path, tyro.conf.Positional]
    """Folder of the bank or merge; features and probe are kept in its task_router folder."""
    data: tuple[str, ...] = ()
    """Datasets that experts were trained on, as NAME=FOLDER; the tasks on the expert's card count, if any."""
    frames_per_episode: int = 2
    """Frames to take from each episode: the first, and others evenly spaced after it."""
    max_frames: int = 400
    """Frames per expert at most, evenly spaced over its episodes."""
    seed: int = 0
    """Decides which frames are held out for calibration."""


def run_fit_probe(config: FitProbeConfig) -> None:
    """Cache the features that are new, fit and calibrate on all, and print how well it went.

    Raises `UserError` for a folder without experts, a dataset that does not fit, or an expert without frames.
    """
    if not holds_experts(config.experts):
        raise UserError(f"{config.experts} is neither a bank nor a merge.")
    if config.frames_per_episode < 1 or config.max_frames < 1:
        raise UserError("--frames-per-episode and --max-frames must be positive.")
    policy = load_experts(config.experts)
    for entry in config.data:
        name, root = _named(entry, policy.names)
        dataset = keep_instructions(open_demonstrations(root), policy.instructions[policy.names.index(name)])
        frames = choose_frames(dataset, config.frames_per_episode, config.max_frames)
        features = torch.stack([policy.base_features(seen) for seen in observations(policy, dataset, frames)])
        save_features(config.experts, name, features, policy.base_hash)
        print(f"{name}: {len(features)} frames of {root}")
    cached = load_features(config.experts, policy.names, policy.base_hash)
    probe = fit_probe(cached, policy.base_hash, config.seed)
    probe.save(config.experts)
    print(
        f"{config.experts}: probe over {', '.join(policy.names)};"
        f" {probe.accuracy:.1%} right on held-out frames, calibration error {probe.calibration_error:.1%},"
        f" temperature {probe.temperature:.2f}"
    )


def choose_frames(dataset: Demonstrations, per_episode: int, limit: int) -> np.ndarray:
    """Global frame indices, ascending: `per_episode` evenly spaced in each episode, `limit` in all.

    Of the chosen tasks' episodes only.
    """
    chosen = dataset.chosen_frames
    starts, first = np.unique(dataset.episode_start[chosen], return_index=True)
    ends = dataset.episode_end[chosen][first]
    spaced = [
        start + np.arange(per_episode) * (end - start) // per_episode
        for start, end in zip(starts, ends, strict=True)
    ]
    frames = np.unique(np.concatenate(spaced))
    return frames[np.linspace(0, len(frames) - 1, min(limit, len(frames))).round().astype(int)]


def observations(
    policy: MultiExpertPolicy, dataset: Demonstrations, frames: Sequence[int]
) -> Iterator[Observation]:
    """The frames as the policy would see them, resized to what it was trained on."""
    images = LiveFrames(dataset, policy.base.contract.interface.cameras[0].height)
    for frame in frames:
        seen = {key: stack[0] for key, stack in images.gather(np.array([frame])).items()}
        state = dataset.state[frame] if dataset.state is not None else np.zeros(0, np.float32)
        yield Observation(seen, state, dataset.instructions[dataset.task[frame]])


def _named(entry: str, names: Sequence[str]) -> tuple[str, Path]:
    name, equals, root = entry.partition("=")
    if not equals or not root:
        raise UserError(f"--data {entry} is malformed; write NAME=FOLDER.")
    if name not in names:
        raise UserError(
            f"--data {entry} names no expert.{nearest(name, names)} There are: {', '.join(names)}."
        )
    return name, Path(root)

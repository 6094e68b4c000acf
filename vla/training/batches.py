"""Assemble training batches from arrays: no DataLoader, no worker processes, no per-sample Python.

A batch has LeRobot's keys and shapes, exactly what a `LeRobotDataset` with the policy's
``delta_timestamps`` and LeRobot's collate would give, with frames already at the policy's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vla.contract import ACTION_KEY, STATE_KEY, Interface
from vla.training.augmentation import AugmentationConfig, augment
from vla.training.dataset import Demonstrations
from vla.training.frame_cache import FrameCache
from vla.training.keyframe import HandPlace, is_closed, next_keyframe

KEYFRAME_KEY = "keyframe"


class BatchSource:
    """Random access to the frames of one or several datasets, numbered one after the other.

    `action_offsets` are the steps of an action chunk relative to now (the policy's
    ``action_delta_indices``).
    """

    def __init__(
        self,
        datasets: Sequence[Demonstrations],
        caches: Sequence[FrameCache],
        action_offsets: Sequence[int],
    ):
        self._caches = caches
        self._offsets = np.asarray(action_offsets)
        self._first = np.cumsum([0] + [len(dataset) for dataset in datasets])
        self._action = np.concatenate([dataset.action for dataset in datasets])
        self._state = (
            np.concatenate([dataset.state for dataset in datasets]) if datasets[0].interface.state else None
        )
        shifted = list(zip(self._first, datasets, strict=False))
        self._start = np.concatenate([first + dataset.episode_start for first, dataset in shifted])
        self._end = np.concatenate([first + dataset.episode_end for first, dataset in shifted])
        self._instruction = np.concatenate(
            [np.array(dataset.instructions, dtype=object)[dataset.task] for dataset in datasets]
        )
        self._keyframe = self._keyframes(datasets[0].interface)

    def __len__(self) -> int:
        return int(self._first[-1])

    def batch(
        self,
        frames: np.ndarray,
        augmentation: AugmentationConfig | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Any]:
        """Return the samples at the global frame indices `frames` (B,), unnormalised, on the CPU.

        Images (B, 3, S, S) uint8, ``observation.state`` (B, s), ``action`` (B, K, D) with steps past the
        end of an episode clamped to its last action and flagged in ``action_is_pad`` (B, K), ``task``
        a list of B strings; ``keyframe`` (B, F) and ``keyframe_is_pad`` (B,) where the interface says
        where the hand is. `augmentation` is applied with the randomness of `generator`.
        """
        steps = frames[:, None] + self._offsets
        start, end = self._start[frames][:, None], self._end[frames][:, None]
        batch: dict[str, Any] = self._images(frames, augmentation, generator)
        batch[ACTION_KEY] = torch.from_numpy(self._action[np.clip(steps, start, end - 1)])
        batch[f"{ACTION_KEY}_is_pad"] = torch.from_numpy((steps < start) | (steps >= end))
        batch["task"] = self._instruction[frames].tolist()
        if self._state is not None:
            batch[STATE_KEY] = torch.from_numpy(self._state[frames])
        if self._keyframe is not None:
            offset, is_pad = self._keyframe
            batch[KEYFRAME_KEY] = torch.from_numpy(offset[frames])
            batch[f"{KEYFRAME_KEY}_is_pad"] = torch.from_numpy(is_pad[frames])
        return batch

    def _images(
        self, frames: np.ndarray, config: AugmentationConfig | None, generator: torch.Generator | None
    ) -> dict[str, torch.Tensor]:
        images = self._gather(frames)
        if config is None:
            return {key: torch.from_numpy(array).permute(0, 3, 1, 2) for key, array in images.items()}
        return {key: augment(array, config, generator) for key, array in images.items()}

    def _gather(self, frames: np.ndarray) -> dict[str, np.ndarray]:
        if len(self._caches) == 1:
            return self._caches[0].gather(frames)
        source = np.searchsorted(self._first, frames, side="right") - 1
        images: dict[str, np.ndarray] = {}
        for k, cache in enumerate(self._caches):
            rows = np.flatnonzero(source == k)
            for key, array in cache.gather(frames[rows] - self._first[k]).items():
                images.setdefault(key, np.empty((len(frames), *array.shape[1:]), np.uint8))[rows] = array
        return images

    def _keyframes(self, interface: Interface) -> tuple[np.ndarray, np.ndarray] | None:
        place = HandPlace.of(interface)
        if place is None:
            return None
        closed = is_closed(self._action[:, -1], interface.action_space)
        return next_keyframe(self._state[:, : place.dim], closed, self._end)

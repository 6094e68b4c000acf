"""Which frames train, which are held out, and in what order: pure functions of the seed.

Nothing here has state, so a resumed run continues with the very sample that the killed one would
have taken next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch


def held_out_episodes(episode: np.ndarray, task: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose episodes for the held-out loss: `fraction` of every task's episodes, rounded down.

    `episode` and `task` are (n,) per frame. Rounding down keeps every demonstration for training when
    there are few. Returns sorted episode indices, a pure function of the arguments.
    """
    first = np.flatnonzero(np.r_[True, episode[1:] != episode[:-1]])
    chosen = []
    for index in np.unique(task):
        candidates = episode[first][task[first] == index]
        generator = np.random.default_rng([seed, int(index)])
        chosen.extend(generator.permutation(candidates)[: int(fraction * len(candidates))])
    return np.sort(np.array(chosen, dtype=np.int64))


@dataclass(frozen=True)
class EpochSampler:
    """An endless stream of frames, shuffled anew in every epoch by ``(seed, epoch)``.

    The permutation of an epoch is the one LeRobot's `EpisodeAwareSampler` draws for the same seed.
    Batches run on across the end of an epoch instead of shrinking, so shapes never change.

    `sources` holds one array of frame indices per dataset. With `weights` an epoch keeps its length, but
    source `k` fills the share ``weights[k] / sum(weights)`` of it from a shuffled stream of its own.
    """

    sources: tuple[np.ndarray, ...]
    seed: int
    weights: Sequence[float] | None = None

    def __post_init__(self):
        # The cache holds this and the next epoch only: at a million frames one permutation is 8 MB.
        object.__setattr__(self, "_cached_order", lru_cache(maxsize=2)(self._order))

    @property
    def epoch_length(self) -> int:
        """Number of samples in one epoch."""
        return sum(map(len, self.sources)) if self.weights is None else sum(self._quotas)

    def take(self, position: int, count: int) -> np.ndarray:
        """Return the frame indices (count,) at ``position, position + 1, ...`` of the stream."""
        parts = []
        while count > 0:
            epoch, offset = divmod(position, self.epoch_length)
            part = self._cached_order(epoch)[offset : offset + count]
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return np.concatenate(parts)

    @property
    def _quotas(self) -> list[int]:
        total = sum(map(len, self.sources))
        return [max(1, round(total * weight / sum(self.weights))) for weight in self.weights]

    def _order(self, epoch: int) -> np.ndarray:
        if self.weights is None:
            frames = np.concatenate(self.sources)
        else:
            streams = (EpochSampler((s,), self.seed + 1 + k) for k, s in enumerate(self.sources))
            frames = np.concatenate(
                [s.take(epoch * quota, quota) for s, quota in zip(streams, self._quotas, strict=True)]
            )
        epoch_seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1, dtype=np.uint64)[0])
        generator = torch.Generator().manual_seed(epoch_seed)
        return frames[torch.randperm(len(frames), generator=generator).numpy()]

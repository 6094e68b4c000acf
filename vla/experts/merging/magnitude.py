"""The k-th largest magnitude of a whole task vector, exactly, without holding the vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vla.experts.low_rank import LowRank

_CHUNK = 1 << 17  # entries counted at a time: bincount wants int64, of which these are 1 MB


class MagnitudeSurvey:
    """Finds, per expert, the largest ``t`` such that at least ``density`` of all entries have ``|τ| >= t``.

    Radix selection in two passes: the bits of a non-negative float32 are ordered like its value, so a
    histogram of the upper 15 bits finds the bucket and one of the lower 16 bits, inside it, the threshold.
    """

    def __init__(self, experts: int, density: float):
        self.density = density
        self.thresholds = (0.0,) * experts
        self._counts = torch.zeros(experts, 1 << 15, dtype=torch.int64)
        self._buckets: list[int] | None = None
        self._missing = [0] * experts
        self.done = density >= 1  # then nothing is trimmed and no pass is needed

    def observe(self, updates: Sequence[LowRank]) -> None:
        """Count one tensor's entries, expert by expert."""
        for expert, update in enumerate(updates):
            self.count(expert, update.dense())

    def count(self, expert: int, delta: Tensor) -> None:
        """Count the entries of one expert's dense update."""
        for chunk in delta.flatten().split(_CHUNK):
            bits = chunk.abs().view(torch.int32)
            upper = bits >> 16
            digit = upper if self._buckets is None else (bits & 0xFFFF)[upper == self._buckets[expert]]
            self._counts[expert] += torch.bincount(digit, minlength=self._counts.shape[1]).cpu()

    def finish_pass(self) -> None:
        """Fix the bucket after the first pass, the threshold after the second."""
        if self._buckets is None:
            totals = self._counts.sum(dim=1).tolist()
            self._missing = [max(1, int(self.density * total)) for total in totals]
            found = [_descend(row, k) for row, k in zip(self._counts, self._missing, strict=True)]
            self._buckets = [bucket for bucket, _ in found]
            self._missing = [left for _, left in found]
            self._counts = torch.zeros(len(found), 1 << 16, dtype=torch.int64)
            return
        lower = [_descend(row, k)[0] for row, k in zip(self._counts, self._missing, strict=True)]
        bits = torch.tensor([(u << 16) | v for u, v in zip(self._buckets, lower, strict=True)])
        self.thresholds = tuple(bits.to(torch.int32).view(torch.float32).tolist())
        self.done = True


def magnitude_threshold(delta: Tensor, density: float) -> float:
    """The same for a single tensor: its ``⌊density·numel⌋``-th largest magnitude, at least the first."""
    survey = MagnitudeSurvey(1, density)
    while not survey.done:
        survey.count(0, delta)
        survey.finish_pass()
    return survey.thresholds[0]


def _descend(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the digit that holds the k-th largest entry, and how many are still to be found inside it."""
    above = counts.flip(0).cumsum(0)
    place = min(int(torch.searchsorted(above, k)), len(counts) - 1)
    digit = len(counts) - 1 - place
    return digit, k - int(above[place] - counts[digit])

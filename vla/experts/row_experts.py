"""Which expert each row of the current batch belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class RowExperts:
    """Holds one expert index per row, (B,) int64, while a batch is being computed; otherwise None.

    A module may see k rows per sample (one per camera, say): its leading axis is then k·B long, sample by
    sample, and `per_sample` folds it back.
    """

    def __init__(self):
        self.current: Tensor | None = None

    @contextmanager
    def set(self, rows: Tensor | None) -> Iterator[None]:
        """Compute what runs inside the block with `rows`; None is the base alone."""
        before, self.current = self.current, rows
        try:
            yield
        finally:
            self.current = before

    def multiplicity(self, length: int) -> int:
        """k of a leading axis of `length`; raises `ValueError` if that is no multiple of the batch."""
        batch = len(self.current)
        if length % batch:
            raise ValueError(f"a leading axis of {length} does not fit a batch of {batch} rows")
        return length // batch

    def select(self, expert: int) -> Tensor:
        """Numbers of the rows that belong to `expert`, ascending."""
        return torch.nonzero(self.current == expert).flatten()

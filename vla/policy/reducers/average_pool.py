"""Average pooling: each token is the mean of one cell of the patch grid."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def average_pool(patches: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Return W (1, h * w, P) with row sums 1; cells differ in size by at most one patch a side."""
    return _matrix(grid, cells).to(patches)[None]


@lru_cache
@torch.inference_mode(False)  # the first call may be in inference, a later one in training
def _matrix(grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    count = grid[0] * grid[1]
    return F.adaptive_avg_pool2d(torch.eye(count).reshape(count, 1, *grid), cells).flatten(1).T

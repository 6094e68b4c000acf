"""Average pooling: each token is the mean of one cell of the patch grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def average_pool(patches: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Return W (1, h * w, P) with row sums 1; cells differ in size by at most one patch a side."""
    count = grid[0] * grid[1]
    each = torch.eye(count, dtype=patches.dtype, device=patches.device).reshape(count, 1, *grid)
    return F.adaptive_avg_pool2d(each, cells).flatten(1).T[None]

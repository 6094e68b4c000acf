"""From P patch tokens to fewer, without the instruction: what EFA-Routing is compared with.

Each reducer is a matrix: ``tokens = W @ patches`` with W (A, P), fixed or chosen from the patches.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vla.policy.reducers.average_pool import average_pool
from vla.policy.reducers.farthest_point import farthest_point
from vla.policy.reducers.fourier import fourier
from vla.policy.reducers.keep_all import keep_all

REDUCERS: dict[str, Callable[[Tensor, tuple[int, int], tuple[int, int]], Tensor]] = {
    "none": keep_all,
    "average_pool": average_pool,
    "fourier": fourier,
    "farthest_point": farthest_point,
}
"""``reduce(patches (N, P, d), grid (H, W), cells (h, w)) -> W (N or 1, h * w, P)`` by name."""

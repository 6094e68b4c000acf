"""Diverse patches by greedy k-center (stage 1 of ToDRE): each new one is farthest from those chosen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def farthest_point(patches: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Return a selection W (N, h * w, P) with one 1 a row, patches in ascending order.

    Distance is ``1 - cos``. The first patch is the one of largest norm (the paper leaves it open); every
    further one maximises the distance to the nearest chosen one, ties to the lower index. The selection
    carries no gradient, the selected patches do.
    """
    unit = F.normalize(patches.float(), dim=-1)
    chosen = [patches.float().norm(dim=-1).argmax(1)]
    nearest = patches.new_full(patches.shape[:2], torch.inf, dtype=torch.float32)
    for _ in range(cells[0] * cells[1] - 1):
        newest = unit.gather(1, chosen[-1][:, None, None].expand(-1, 1, unit.shape[-1]))
        nearest = torch.minimum(nearest, 1 - (unit @ newest.transpose(1, 2)).squeeze(-1))
        nearest.scatter_(1, chosen[-1][:, None], -torch.inf)  # rounding must not choose one twice
        chosen.append(nearest.argmax(1))
    indices = torch.stack(chosen, 1).sort(1).values
    return F.one_hot(indices, patches.shape[1]).to(patches)

"""What the routers did with one observation, for reports and drawings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RoutingReport:
    """Router decisions for a batch of one.

    `cameras` are the image keys in token order, `tokens_per_camera` the vision tokens A of each;
    vision token ``i`` belongs to camera ``i // A``. `kept[l]` are the ascending indices of the vision tokens
    that routed decoder layer ``l`` computed on. `patch_weights[key]` (A, g, g) says how much of each image
    patch (row, column) went into each aggregation token of that camera; a token's weights sum to at most 1.
    """

    cameras: tuple[str, ...]
    tokens_per_camera: int
    kept: dict[int, np.ndarray]
    patch_weights: dict[str, np.ndarray]

    def heat(self, camera: str, layer: int) -> np.ndarray:
        """Mean patch weight over the tokens of `camera` that `layer` kept, (g, g); sums to at most 1."""
        first = self.cameras.index(camera) * self.tokens_per_camera
        mine = self.kept[layer] - first
        mine = mine[(mine >= 0) & (mine < self.tokens_per_camera)]
        return self.patch_weights[camera][mine].sum(0) / max(len(mine), 1)


def make_report(config, trace: dict[str, Any]) -> RoutingReport:
    """Build the report from the `trace` that one forward pass of a batch of one collected."""
    keys = config.camera_keys
    return RoutingReport(
        cameras=tuple(keys),
        tokens_per_camera=math.prod(config.vision_grid),
        kept={layer: kept[0].cpu().numpy() for layer, kept in trace.get("kept", {}).items()},
        patch_weights={key: trace["patch_weights"][0, i].float().cpu().numpy() for i, key in enumerate(keys)},
    )

"""The policy's image resize, shared by training's frame cache and by evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_area(images: Tensor, size: int) -> Tensor:
    """Area-average images (..., 3, H, W), uint8 or float in [0, 1], to uint8 (..., 3, size, size).

    Rounding to uint8 makes a frame that was cached small equal, bit for bit, to one resized on the fly.
    Images of the right size only change type.
    """
    if images.dtype != torch.uint8:
        images = images.float() * 255
    if images.shape[-2:] != (size, size):
        flat = images.float().reshape(-1, *images.shape[-3:])
        images = F.interpolate(flat, (size, size), mode="area").reshape(*images.shape[:-2], size, size)
    if images.dtype == torch.uint8:
        return images
    return images.round().clamp(0, 255).to(torch.uint8)


def unit_range(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1], whatever type they come in."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()

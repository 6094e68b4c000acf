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
    height, width = images.shape[-2:]
    if height % size == 0 and width % size == 0 and (height, width) != (size, size):
        images = _block_mean(images.float(), height // size, width // size)
    elif (height, width) != (size, size):
        flat = images.float().reshape(-1, *images.shape[-3:])
        images = F.interpolate(flat, (size, size), mode="area").reshape(*images.shape[:-2], size, size)
    if images.dtype == torch.uint8:
        return images
    return images.round().clamp(0, 255).to(torch.uint8)


def _block_mean(images: Tensor, rows: int, columns: int) -> Tensor:
    """Mean over blocks of `rows` x `columns` pixels: what torch's area mode computes, four times as fast."""
    summed = sum(images[..., row::rows, :] for row in range(rows))
    return sum(summed[..., column::columns] for column in range(columns)) / (rows * columns)


def unit_range(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1], whatever type they come in."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()

"""Random shift and colour jitter, for a whole batch at a time.

A small policy trained from a hundred demonstrations memorises pixels; shifting by a few pixels (DrQ,
arXiv:2004.13649) and varying light and colour is what makes it look at objects. Everything is a few
passes over the batch, about 3 % of a training step of the nano policy on two cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: ITU-R BT.601 weights of grey.
_LUMA = torch.tensor([0.299, 0.587, 0.114])
_SLICE = 4


@dataclass(frozen=True)
class AugmentationConfig:
    """Ranges of the random changes; 0 switches one off.

    A factor is drawn from ``[1 - x, 1 + x]`` per sample and camera. `shift` is in pixels of the policy's
    input.
    """

    shift: int = 6
    """Largest shift in each direction, in pixels; the border is repeated."""
    brightness: float = 0.2
    """Range of the factor on all channels."""
    contrast: float = 0.2
    """Range of the factor on the distance from the image's mean grey."""
    saturation: float = 0.2
    """Range of the factor on the distance from each pixel's grey."""
    color: float = 0.1
    """Range of one factor per channel (the tint of the light)."""


def augment(frames: np.ndarray, config: AugmentationConfig, generator: torch.Generator) -> Tensor:
    """Shift and recolour frames (B, H, W, 3) uint8; return (B, 3, H, W) uint8 in channels-last memory.

    All randomness comes from `generator`, one draw per sample.
    """
    shifted = torch.from_numpy(random_shift(frames, config.shift, generator))
    if config.brightness or config.contrast or config.saturation or config.color:
        shifted = color_jitter(shifted, config, generator)
    return shifted.permute(0, 3, 1, 2)


def random_shift(frames: np.ndarray, limit: int, generator: torch.Generator) -> np.ndarray:
    """Pad (B, H, W, C) by `limit` repeated border pixels and crop back at a random offset per sample."""
    if limit == 0:
        return frames
    batch, height, width, _ = frames.shape
    padded = np.pad(frames, ((0, 0), (limit, limit), (limit, limit), (0, 0)), mode="edge")
    # A view of every possible crop, (B, 2 limit + 1, 2 limit + 1, C, H, W); indexing copies one per sample.
    crops = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    crops = crops.transpose(0, 1, 2, 4, 5, 3)
    rows, columns = torch.randint(0, 2 * limit + 1, (2, batch), generator=generator).numpy()
    return np.ascontiguousarray(crops[np.arange(batch), rows, columns])


def color_jitter(frames: Tensor, config: AugmentationConfig, generator: torch.Generator) -> Tensor:
    """Jitter brightness, contrast, saturation and tint of frames (B, H, W, 3) uint8; return the same.

    Each of the four is an affine map of RGB, so they compose to one 3x3 matrix and one offset per sample
    and the pixels are touched once: ``rgb' = gain * (s rgb + (1 - s) grey)``, then contrast about the
    mean grey `m`, ``c rgb' + (1 - c) m``.
    """
    matrix, offset = (part.to(frames.device) for part in _color_map(frames, config, generator))
    jittered = torch.empty_like(frames)
    # A few samples at a time: a float copy of the whole batch would not fit the CPU's cache.
    for i in range(0, len(frames), _SLICE):
        pixels = frames[i : i + _SLICE]
        flat = torch.baddbmm(offset[i : i + _SLICE], pixels.flatten(1, 2).float(), matrix[i : i + _SLICE])
        jittered[i : i + _SLICE] = flat.add_(0.5).clamp_(0, 255).view(pixels.shape)
    return jittered


def _color_map(
    frames: Tensor, config: AugmentationConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The matrix (B, 3, 3) and offset (B, 1, 3) by which row vectors of RGB are mapped."""
    draw = torch.rand(len(frames), 6, generator=generator) * 2 - 1
    brightness = 1 + draw[:, :1] * config.brightness
    contrast = 1 + draw[:, 1] * config.contrast
    saturation = (1 + draw[:, 2] * config.saturation)[:, None, None]
    gain = brightness * (1 + draw[:, 3:] * config.color)
    matrix = (saturation * torch.eye(3) + (1 - saturation) * _LUMA[:, None]) * gain[:, None, :]
    mean = frames[:, ::4, ::4].float().mean((1, 2)).cpu()  # every 16th pixel is plenty for a mean
    grey = (mean[:, None, :] @ matrix)[:, 0] @ _LUMA
    offset = ((1 - contrast) * grey)[:, None, None].expand(-1, 1, 3)
    return contrast[:, None, None] * matrix, offset

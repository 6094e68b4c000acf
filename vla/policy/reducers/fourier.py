"""Low-pass by a two-dimensional DCT, cropped and inverted at the smaller size (Fourier-VLM)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def fourier(patches: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Return W = kron(L_h, L_w), (1, h * w, P), with ``L = sqrt(h / H) C_h^T [I_h 0] C_H``.

    C_n is the orthonormal DCT-II. The factor undoes the gain of inverting at a smaller size, so that a
    constant image keeps its value.
    """
    return _matrix(grid, cells).to(patches)[None]


@lru_cache
@torch.inference_mode(False)  # the first call may be in inference, a later one in training
def _matrix(grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    rows, columns = (_low_pass(full, small) for full, small in zip(grid, cells, strict=True))
    return torch.kron(rows, columns)


def _low_pass(full: int, small: int) -> Tensor:
    cropped = _dct(full)[:small]
    return math.sqrt(small / full) * _dct(small).T @ cropped


def _dct(size: int) -> Tensor:
    """The orthonormal DCT-II matrix (size, size), fp64: row k is ``c_k cos(pi (2 j + 1) k / (2 size))``."""
    position = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / (2 * size) * (2 * position + 1) * position[:, None])
    matrix *= math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix

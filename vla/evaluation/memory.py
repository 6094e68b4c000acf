"""Keeping a worker small: what it holds, and what it holds twice."""

from __future__ import annotations

import ctypes
import mmap
import platform
from typing import Any

_MADV_DONTNEED = 4  # Linux: give the pages back now, read zeros afterwards


def resident_mb() -> float:
    """Resident memory of this process in MB (10^6 bytes)."""
    import psutil

    return round(psutil.Process().memory_info().rss / 1e6, 1)


def drop_uploaded_textures(model: Any) -> None:
    """Give back the texture pixels of a ``mujoco.MjModel`` once the renderer has uploaded them.

    LIBERO's scenes hold 140 to 250 MB of them, and software OpenGL keeps its own copy; physics never
    reads them. Afterwards no second renderer can be made for this model: its textures would be black.
    Does nothing except on Linux.
    """
    if platform.system() != "Linux":
        return
    pixels = model.tex_data
    first = -(-pixels.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (pixels.ctypes.data + pixels.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)

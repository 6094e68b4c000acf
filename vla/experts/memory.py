"""Freed tensors go back to the system at once, so that a stream's memory is that of its largest moment."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
_RETURNED_FROM = 1 << 20  # bytes
_KEPT_AT_MOST = 8 << 20


def return_freed_memory() -> bool:
    """Tell glibc to map blocks of 1 MB and more one by one; return False where the C library is another one.

    By default it raises that threshold to the largest block freed so far (up to 32 MB), after which tensors
    share a heap with holes that is never given back: streaming ten 16 MB tensors of four experts grew the
    process by 240 MB instead of 33 MB (torch 2.11). It holds for the whole process.

    Up to 8 MB of smaller blocks stay: with glibc's own 128 kB the work on a few thousand entries at a time
    (`vla.experts.task_masks.blocks`) would give its memory back, and fault on it anew, at every step.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    limits = (_M_MMAP_THRESHOLD, _RETURNED_FROM), (_M_TRIM_THRESHOLD, _KEPT_AT_MOST)
    return all(mallopt(*limit) for limit in limits)

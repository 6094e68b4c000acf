"""Emulated hardware: a Feetech bus on a pseudo-terminal, in a process of its own, with faults on demand."""

from .emulator import Emulator

__all__ = ["Emulator"]

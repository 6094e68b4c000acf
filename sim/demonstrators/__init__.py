"""Scripted demonstrators: skills that solve LIBERO's tasks from privileged state, through `env.step` only."""

from .demonstrator import Demonstration, Demonstrator, demonstrate
from .style import CLEAN, DEFAULT, Style

__all__ = ["CLEAN", "DEFAULT", "Demonstration", "Demonstrator", "Style", "demonstrate"]

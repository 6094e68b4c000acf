"""A policy step compiled for one shape: traced, cut by what changes when, and run in one of several modes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vla.runtime.cuda_graph import CudaGraph
from vla.runtime.int8 import quantise_linears
from vla.runtime.policy_step import PolicyStep
from vla.runtime.specialise import specialise, trace

Observation = tuple[Tensor, Tensor]
"""Images (B, I, 3, H, W) uint8 and states (B, state_dim) float32."""


@dataclass(frozen=True)
class Mode:
    """How a program computes: in which precision, and whether through torch's compiler (CPU only)."""

    precision: str
    compiled: bool = False


MODES = {
    "fp32": Mode("fp32"),
    "fp32_compiled": Mode("fp32", compiled=True),
    "bf16": Mode("bf16"),
    "bf16_compiled": Mode("bf16", compiled=True),
    "int8": Mode("int8"),
}
"""Modes by the name that a command line uses. On a GPU every mode is a captured graph; int8 is for CPUs."""


def modes_for(device: torch.device) -> tuple[str, ...]:
    """Return the names of the modes that `device` can run; torch's compiler for CPUs needs a C++ compiler."""
    if device.type != "cpu":
        return "fp32", "bf16"
    can_compile = shutil.which(os.environ.get("CXX", "g++")) is not None
    return tuple(name for name, mode in MODES.items() if can_compile or not mode.compiled)


class Program:
    """`step` at the shapes of one example: `tokens` (B, T), `valid` (B, T) and `observation`.

    Building one traces the step, which takes seconds for small and minutes for large policies.
    """

    def __init__(self, step: PolicyStep, tokens: Tensor, valid: Tensor, observation: Observation, mode: Mode):
        inputs = (tokens, valid, *observation)
        with torch.no_grad():
            step(*inputs)  # what the policy computes once and keeps must not be computed while it is traced
        parts = specialise(trace(_in_precision(step, mode.precision), inputs), early_inputs=2)
        if mode.precision == "int8":
            quantise_linears(parts.late)
        self._early = parts.early
        self._run: Callable[..., Tensor] = parts.late
        if mode.compiled:
            self._run = torch.compile(parts.late, fullgraph=True, dynamic=False, options=compiler_options())
        if tokens.device.type == "cuda":
            self._run = CudaGraph(self._run, (*observation, *self.instruction(tokens, valid)))

    @torch.no_grad()
    def instruction(self, tokens: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """Compute what depends on the instructions alone."""
        return self._early(tokens, valid)

    @torch.no_grad()
    def __call__(self, observation: Observation, instruction: tuple[Tensor, ...]) -> Tensor:
        """Return actions (B, K, D) float32 for `observation` under what `instruction` returned."""
        return self._run(*observation, *instruction)


def compiler_options() -> dict[str, bool | int]:
    """What torch's compiler is told.

    The number of threads is written into the code that it generates, but not into the key under which it
    keeps the code on disk (torch 2.11) unless it is an option: one thread would run what was made for two.
    """
    return {"freezing": True, "cpp.threads": torch.get_num_threads()}


def _in_precision(step: PolicyStep, precision: str) -> Callable[..., Tensor]:
    """Let matrix products run in bf16 where `precision` says so; the cut keeps their weights in bf16."""

    def run(tokens: Tensor, valid: Tensor, images: Tensor, state: Tensor) -> Tensor:
        reduced = precision == "bf16"
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=reduced, cache_enabled=False):
            return step(tokens, valid, images, state)

    return run

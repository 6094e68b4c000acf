"""What a merging method is: a frozen set of options and a pure function of one tensor's updates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from vla.errors import UserError
from vla.experts.low_rank import LowRank


class Survey(Protocol):
    """Terms that are global over all tensors, gathered in cheap passes before the merge.

    In each pass `observe` sees every tensor's updates once and `finish_pass` closes it; when `done`, no
    further pass is needed.
    """

    done: bool

    def observe(self, updates: Sequence[LowRank]) -> None:
        """Take one tensor's updates in."""

    def finish_pass(self) -> None:
        """All tensors have been observed once."""


@dataclass(frozen=True)
class TensorContext:
    """What a method may know of a tensor beside its updates.

    `tensor` is its name; `experts` and `weights` go with the updates, in the same order; `survey` is the
    method's own, completed, or None.
    """

    tensor: str
    experts: tuple[str, ...]
    weights: tuple[float, ...]
    seed: int = 0
    survey: Survey | None = None

    def generator(self, expert: str) -> torch.Generator:
        """Random numbers that depend on seed, expert and tensor only: not on the order of the stream."""
        digest = hashlib.sha256(f"{self.seed}/{expert}/{self.tensor}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class MergeMethod:
    """Base of all methods. The fields of a subclass are the options that a recipe may set.

    `takes_weights`: whether experts may have weights other than 1. `own_masks`: whether the method defines
    its task masks itself (then `mask` is used instead of the λ rule). `own_scale`: whether it gives each task
    one factor for all tensors, ``γ_m = Σ|τ_m| / Σ|S_m ⊙ τ_merge|``.
    """

    takes_weights: ClassVar[bool] = False
    own_masks: ClassVar[bool] = False
    own_scale: ClassVar[bool] = False

    def merge(self, updates: Sequence[LowRank], context: TensorContext) -> Tensor:
        """Merge M updates of one (m, n) matrix into ``τ_merge`` (m, n), float32."""
        raise NotImplementedError

    def start_survey(self, experts: int) -> Survey | None:
        """Begin to gather global terms, or None if the method needs none."""
        return None

    @property
    def signed(self) -> bool:
        """Whether a task may use entries negated or doubled too, by a second mask (`negated`)."""
        return False

    def mask(self, delta: Tensor, merged: Tensor) -> Tensor:
        """The method's own task mask, booleans of the shape of `delta`; only with `own_masks`."""
        raise NotImplementedError

    def negated(self, delta: Tensor, merged: Tensor) -> Tensor:
        """Where the task uses the entry negated or, at `mask` too, doubled; only if `signed`."""
        raise NotImplementedError


def require_fraction(name: str, value: float, *, zero: bool) -> None:
    """Raise `UserError` unless `value` lies in (0, 1], or in [0, 1) if `zero` is what may be reached."""
    if not (0 <= value < 1 if zero else 0 < value <= 1):
        interval = "at least 0 and below 1" if zero else "above 0 and at most 1"
        raise UserError(f"The option {name} is {value}; it must be {interval}.")


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise `UserError` unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"The option {name} is '{value}'; choose from {', '.join(choices)}.")

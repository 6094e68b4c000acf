"""What a task router is: scores for every expert, a margin, and the honesty to abstain."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from vla.errors import UserError
from vla.experts.multi_expert import MultiExpertPolicy, Observation


@dataclass(frozen=True)
class RouterSettings:
    """`margin` below which a router abstains (None: its own), `parity` for the published form where ours
    differs, `folder` of the bank or merge, for routers that keep something there.
    """

    margin: float | None = None
    parity: bool = False
    folder: Path | None = None


@dataclass(frozen=True)
class Decision:
    """`expert` has the highest of `scores`; `margin` is its lead over the second, None with one expert.

    `abstained`: the lead was too small to mean anything. `expert` is then no more than the best guess.
    """

    expert: int
    scores: tuple[float, ...]
    margin: float | None
    abstained: bool


class TaskRouter(ABC):
    """Chooses among the experts of `policy`. Scores are comparable within one observation only."""

    #: Lead below which the router abstains unless told otherwise, in units of its scores.
    own_margin: ClassVar[float]
    #: Whether the literature's form differs from ours and is there under `RouterSettings.parity`.
    has_published_form: ClassVar[bool] = False

    def __init__(self, policy: MultiExpertPolicy, settings: RouterSettings):
        self.policy = policy
        self.margin = self.own_margin if settings.margin is None else settings.margin
        if not self.margin >= 0:
            raise UserError(f"The router's margin is {self.margin}; it must be 0 or more.")

    @abstractmethod
    def scores(self, seen: Observation) -> Tensor:
        """One number per expert, (M,); higher is better."""

    def route(self, seen: Observation, truth: str | None = None) -> Decision:
        """Choose an expert. `truth` is the right one where somebody knows; only the oracle looks at it.

        The state of torch's random numbers is left as it was: a policy that samples acts as without a router.
        """
        with torch.random.fork_rng(devices=[]):
            return self.decide(self.scores(seen))

    def decide(self, scores: Tensor) -> Decision:
        """Take the best of `scores` (M,); equal scores go to the first expert. Raises if one is NaN."""
        if scores.isnan().any():
            raise ValueError(f"{type(self).__name__} gave scores that are not numbers: {scores.tolist()}")
        order = torch.sort(scores, descending=True, stable=True).indices
        margin = float(scores[order[0]] - scores[order[1]]) if len(scores) > 1 else None
        abstained = margin is not None and (margin < self.margin or margin == 0)
        return Decision(int(order[0]), tuple(scores.tolist()), margin, abstained)

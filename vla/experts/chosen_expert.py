"""A bank or a merge of which one expert acts: chosen once, for a task, before anything moves.

Where an evaluation lets the router's best guess act, an arm stays where it is and a server's client gets no
actions: a router that abstains, or an instruction that two experts know, is a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from vla.contract import PolicyContract
from vla.errors import UserError
from vla.experts.multi_expert import MultiExpertPolicy, Observation
from vla.experts.task_routers import TASK_ROUTERS
from vla.experts.task_routers.router import Decision, TaskRouter

SHOWN = 3  # instructions of an expert


class ChosenExpert:
    """A policy of several experts of which the one acts whom `router` takes.

    A router that reads the instruction alone is asked with `choose`; any other looks at the first
    observation, in pre-flight. `choice` says who acts and why, empty until that is known.
    """

    def __init__(self, policy: MultiExpertPolicy, router: TaskRouter):
        self._policy, self._router = policy, router
        self._expert: int | None = None
        self.choice: dict[str, Any] = {}

    @property
    def contract(self) -> PolicyContract:
        """The chosen expert's contract, with its statistics; before the choice the base's."""
        face = self._policy.base if self._expert is None else self._policy.faces[self._expert]
        return face.contract

    def reset(self, seed: int) -> None:
        """Seed torch, for action decoders that sample. Who acts stays: the task is the same."""
        torch.manual_seed(seed)

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, instruction: str) -> np.ndarray:
        """Let the expert answer, (K, D); choose it first if nobody has. Raises `UserError` on abstention."""
        seen = Observation(images, state, instruction)
        if self._expert is None:
            self.choose(seen)
        return self._policy.act([seen], [self._expert])[0]

    def choose(self, seen: Observation) -> None:
        """Ask the router. Raises `UserError` if it abstains."""
        decision = self._router.route(seen)
        if decision.abstained:
            raise UserError(self._undecided(decision, seen.instruction))
        self._expert = decision.expert
        self.choice.update(expert=self._policy.names[decision.expert], by=self._name, margin=decision.margin)

    @property
    def sentence(self) -> str:
        """Who acts and why."""
        if not self.choice:
            return "not chosen yet"
        return f"'{self.choice['expert']}' acts ({self.choice['by']}, {self.choice['margin']:.2f} ahead)"

    @property
    def _name(self) -> str:
        return next(name for name, kind in TASK_ROUTERS.items() if type(self._router) is kind)

    def _undecided(self, decision: Decision, instruction: str) -> str:
        names, known = self._policy.names, self._policy.instructions
        first, second = np.argsort(decision.scores, kind="stable")[::-1][:2]
        taught = "; ".join(
            f"'{names[i]}' was trained on {', '.join(map(repr, known[i][:SHOWN])) or 'unnamed tasks'}"
            for i in (first, second)
        )
        lead = f"lead {decision.margin:.3f}, needed {self._router.margin:g}"
        return (
            f"The task router '{self._name}' cannot tell whether '{names[first]}' or '{names[second]}' is"
            f" meant by '{instruction}' ({lead}): word the task as an expert was taught ({taught}), or name"
            " the expert with --expert."
        )

"""The router that is told: the upper bound that every other router is measured against."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vla.errors import UserError
from vla.experts.multi_expert import Observation
from vla.experts.task_routers.router import Decision, TaskRouter


class OracleRouter(TaskRouter):
    """Takes the expert that the evaluation knows to be right."""

    own_margin: ClassVar[float] = 0.0

    def route(self, seen: Observation, truth: str | None = None) -> Decision:
        """Choose `truth`; raises `UserError` if nobody knows it or it is no expert."""
        if truth is None:
            raise UserError(
                f"Nobody told the oracle which expert '{seen.instruction}' belongs to; name it with"
                " --task-experts, or choose another router."
            )
        scores = torch.zeros(len(self.policy.names))
        scores[self.policy.index(truth)] = 1.0
        return self.decide(scores)

    def scores(self, seen: Observation) -> Tensor:
        """There is nothing to be seen."""
        raise NotImplementedError

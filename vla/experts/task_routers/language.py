"""The instruction says which skill is meant: its embedding against those that each expert was trained on."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.errors import UserError
from vla.experts.multi_expert import MultiExpertPolicy, Observation
from vla.experts.task_routers.router import RouterSettings, TaskRouter


class LanguageRouter(TaskRouter):
    """``s_m = max_j cos(e(u) − μ, e(u_mj) − μ)`` over the instructions ``u_mj`` of expert m.

    ``e`` is the base's mean word embedding and ``μ`` its mean over all known instructions: what they have in
    common ("pick up the ... and place it in the ...") would otherwise bring every cosine close to 1. An
    instruction that two experts know has no lead, and the router abstains.
    """

    own_margin: ClassVar[float] = 0.05

    def __init__(self, policy: MultiExpertPolicy, settings: RouterSettings):
        super().__init__(policy, settings)
        silent = [name for name, known in zip(policy.names, policy.instructions, strict=True) if not known]
        if silent:
            raise UserError(
                f"The expert '{silent[0]}' does not say which instructions it was trained on; add it to the"
                " bank again with --instructions, or choose another router."
            )
        embedded = [
            torch.stack([policy.embed_instruction(text) for text in known]) for known in policy.instructions
        ]
        distinct = torch.cat(embedded).unique(dim=0)
        self._mean = distinct.mean(0) if len(distinct) > 1 else torch.zeros_like(distinct[0])
        self._known = [F.normalize(rows - self._mean, dim=-1) for rows in embedded]

    def scores(self, seen: Observation) -> Tensor:
        """Cosine to the nearest instruction of each expert, (M,)."""
        asked = F.normalize(self.policy.embed_instruction(seen.instruction) - self._mean, dim=-1)
        return torch.stack([(rows @ asked).amax() for rows in self._known])

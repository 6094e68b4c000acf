"""MergeVLA's router (arXiv 2511.18810, test-time routing): whose value projection does the observation fit?

For expert m and value projection p of one block, let ``P_mp`` (k, n) be the first k right singular vectors of
what the expert changed there, ``τ_mp``, and ``h`` what the projection reads when the expert itself looks at
the observation. ::

    r_m = mean over p, mean over tokens:  ‖P_mp h‖ / ‖h‖

This differs from the published form, which `parity` gives, in three ways. The subspace and the states belong
to the same block (published: the subspace of the block before the last, on states that the last block reads).
The energy is relative to the state's norm: states of different experts differ in size, and size would win.
And the subspace is that of the task vector ``τ_m``, not of the weight ``W_0 + τ_m``: experts that start from
one base share nearly all of ``W_0``, while MergeVLA's train their projections from scratch.
"""

from __future__ import annotations

import re
from typing import ClassVar

import torch
from torch import Tensor, nn

from vla.errors import UserError
from vla.experts.multi_expert import DECODER, MultiExpertPolicy, Observation
from vla.experts.task_routers.router import RouterSettings, TaskRouter

RANK = 8
#: Where value projections are looked for: the action decoder's own blocks, else the language model's.
_STACKS = ("model.action_decoder.", f"{DECODER}.")
_PROJECTION = re.compile(r"(?P<block>.*\.\d+)\.(?P<end>(?:self_attn\.)?v_\w+)")


class ValueSubspaceRouter(TaskRouter):
    """See the module's equation. One batched forward over all experts per decision."""

    own_margin: ClassVar[float] = 0.002
    has_published_form: ClassVar[bool] = True

    def __init__(self, policy: MultiExpertPolicy, settings: RouterSettings):
        super().__init__(policy, settings)
        self.parity = settings.parity
        blocks = value_blocks(policy.policy)
        if len(blocks) < 1 + self.parity:
            raise UserError("The policy has too few blocks with value projections for this router.")
        self.modules = blocks[-1]
        sources = dict(zip(blocks[-1], blocks[-2] if self.parity else blocks[-1], strict=True))
        self._subspaces = {
            module: torch.stack([self._subspace(m, source) for m in range(len(policy.names))])
            for module, source in sources.items()
        }

    def _subspace(self, expert: int, module: str) -> Tensor:
        """``P_mp`` (k, n)."""
        tensor = f"{module}.weight"
        change = self.policy.task_vector(expert, tensor)
        if change is None or not change.any():
            raise UserError(
                f"The expert '{self.policy.names[expert]}' has no '{tensor}' of its own, whose subspace the"
                " value_subspace router looks at; choose another router."
            )
        matrix = self.policy.task_weight(expert, tensor) if self.parity else change
        _, sizes, rows = torch.linalg.svd(matrix, full_matrices=False)
        kept = rows[:RANK] * (sizes[:RANK] > 1e-5 * sizes[0])[:, None]  # an update of lower rank spans less
        return torch.cat([kept, kept.new_zeros(RANK - len(kept), kept.shape[1])])

    def scores(self, seen: Observation) -> Tensor:
        """``r_m``, (M,)."""
        ratios = []
        for module, h in self.policy.inputs_of(self.modules, seen).items():
            inside = torch.einsum("mtn,mkn->mtk", h, self._subspaces[module]).norm(dim=-1)
            ratios.append((inside if self.parity else inside / h.norm(dim=-1).clamp(min=1e-12)).mean(-1))
        return torch.stack(ratios).mean(0)


def value_blocks(policy: nn.Module) -> list[tuple[str, ...]]:
    """The value projections of each block, first block first; of the action decoder if it has any."""
    linear = [name for name, module in policy.named_modules() if isinstance(module, nn.Linear)]
    for stack in _STACKS:
        blocks: dict[str, list[str]] = {}
        for name in linear:
            match = _PROJECTION.fullmatch(name)
            if match and name.startswith(stack):
                blocks.setdefault(match["block"], []).append(name)
        if blocks:
            return [tuple(sorted(names)) for names in blocks.values()]
    return []

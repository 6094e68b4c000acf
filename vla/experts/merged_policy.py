"""A merged checkpoint that acts: each task with its masks, its private tensors and its statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vla.contract import CONTRACT_FILE, PolicyContract
from vla.errors import UserError
from vla.experts.bank_folder import require_same_interface
from vla.experts.expert_policy import with_statistics
from vla.experts.live_merge import LiveMerge
from vla.experts.lora_expert import load_card
from vla.experts.merge import EXPERTS_FOLDER
from vla.experts.merged import MergedCheckpoint
from vla.experts.multi_expert import MultiExpertPolicy
from vla.policy.checkpoint import LoadedPolicy, load_checkpoint


class MergedPolicy(MultiExpertPolicy):
    """The merged network. A batch with rows of several tasks is computed task by task."""

    @classmethod
    def load(cls, folder: Path | MergedCheckpoint, device: str = "cpu") -> MergedPolicy:
        """Load a merge; raises `UserError` as `MergedCheckpoint.open` and `load_checkpoint` do."""
        merged = folder if isinstance(folder, MergedCheckpoint) else MergedCheckpoint.open(folder)
        return cls(merged, load_checkpoint(merged.folder, device))

    def __init__(self, merged: MergedCheckpoint, loaded: LoadedPolicy):
        places = [merged.folder / EXPERTS_FOLDER / name for name in merged.experts]
        cards = [load_card(place) for place in places]
        super().__init__(
            loaded,
            [_face(loaded, place) for place in places],
            merged.experts,
            [card.instructions if card else () for card in cards],
            merged.manifest["base"]["sha256"],
        )
        self.live = LiveMerge(merged, self.policy.state_dict())  # which shares memory with the parameters
        if any("embed_tokens" in name for name in self.live.private):
            raise UserError(
                f"The tasks of {merged.folder} keep word embeddings of their own, so instructions cannot be"
                " compared; train the experts again without."
            )

    @torch.no_grad()
    def forward(self, batch: Mapping[str, Tensor], experts: Sequence[int] | None) -> Tensor:
        """See `MultiExpertPolicy.forward`."""
        if experts is None:
            self.live.switch_to_base()
            return self.policy.predict_action_chunk(batch)
        order, parts = [], []
        for expert in sorted(set(experts)):
            rows = [row for row, wanted in enumerate(experts) if wanted == expert]
            self.live.switch(expert)
            parts.append(self.policy.predict_action_chunk({key: value[rows] for key, value in batch.items()}))
            order += rows
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def task_vector(self, expert: int, tensor: str) -> Tensor | None:
        """See `MultiExpertPolicy.task_vector`; where there are masks it is ``γ_m S_m ⊙ α τ_merge``."""
        return self.live.task_vector(expert, tensor)

    def task_weight(self, expert: int, tensor: str) -> Tensor:
        """See `MultiExpertPolicy.task_weight`."""
        return self.live.task_weight(expert, tensor)


def _face(loaded: LoadedPolicy, place: Path) -> LoadedPolicy:
    """The network with the statistics of the expert whose folder is `place`."""
    if not (place / CONTRACT_FILE).exists():
        return loaded
    contract = PolicyContract.load(place)
    require_same_interface(contract, loaded.contract, place.name)
    return with_statistics(loaded, contract.statistics)

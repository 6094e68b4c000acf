"""A merged checkpoint that acts: one set of live weights, switched from task to task by their masks.

``Θ_0``, ``α τ_merge`` and one bit per weight and task stay in memory, so that a switch reads nothing from
disk. It writes into the live buffers: a captured graph goes on reading them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from vla.contract import CONTRACT_FILE, PolicyContract
from vla.errors import UserError
from vla.experts.bank_folder import require_same_interface
from vla.experts.expert_policy import with_statistics
from vla.experts.lora_expert import BASE_WEIGHTS_FILE, base_hash, load_card
from vla.experts.merge import DELTA_FILE, EXPERTS_FOLDER, MASK_FILE, PRIVATE_FILE
from vla.experts.merged import MergedCheckpoint
from vla.experts.multi_expert import MultiExpertPolicy
from vla.experts.task_masks import unpack
from vla.experts.tensor_stream import TensorFile
from vla.kernels.masked_delta_apply import masked_delta_apply
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
        self._merged = merged
        self._live = self.policy.state_dict()  # shares memory with the parameters
        self._masks = [self._read(place / MASK_FILE) for place in places]
        self._private = [self._read(place / PRIVATE_FILE) for place in places]
        self._delta = self._read(merged.folder / DELTA_FILE)
        base = TensorFile(merged.base / BASE_WEIGHTS_FILE) if self._delta else {}
        self._base = {name: base[name].to(self._live[name].device) for name in self._delta}
        rescale = merged.manifest["rescale"]
        self._rescaled = frozenset(rescale["tensors"])
        self._gamma = [rescale["experts"].get(name, 1.0) for name in merged.experts]
        # What a task without a version of its own has there: the file's, which is the base's.
        owned = {name for private in self._private for name in private}
        self._unowned = {name: self._live[name].clone() for name in sorted(owned)}
        if any("embed_tokens" in name for name in owned):
            raise UserError(
                f"The tasks of {merged.folder} keep word embeddings of their own, so instructions cannot be"
                " compared; train the experts again without."
            )
        self._task: int | None = None
        self._at_base = False

    @torch.no_grad()
    def switch(self, expert: int) -> None:
        """Make the live weights those of one task; nothing is read from disk."""
        if self._at_base:
            for name, (_, merged) in self._outside_masks.items():
                self._live[name].copy_(merged)
        if self._at_base or expert != self._task:
            for name, delta in self._delta.items():
                scale = self._gamma[expert] if name in self._rescaled else 1.0
                masked_delta_apply(
                    self._live[name], self._base[name], delta, self._masks[expert][name], scale
                )
            for name, unowned in self._unowned.items():
                self._live[name].copy_(self._private[expert].get(name, unowned))
        self._task, self._at_base = expert, False

    @torch.no_grad()
    def forward(self, batch: Mapping[str, Tensor], experts: Sequence[int] | None) -> Tensor:
        """See `MultiExpertPolicy.forward`."""
        if experts is None:
            self._switch_to_base()
            return self.policy.predict_action_chunk(batch)
        present, order, parts = sorted(set(experts)), [], []
        for expert in present:
            rows = [row for row, wanted in enumerate(experts) if wanted == expert]
            self.switch(expert)
            parts.append(self.policy.predict_action_chunk({key: value[rows] for key, value in batch.items()}))
            order += rows
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def task_vector(self, expert: int, tensor: str) -> Tensor | None:
        """See `MultiExpertPolicy.task_vector`; where there are masks it is ``γ_m S_m ⊙ α τ_merge``."""
        if tensor in self._delta:
            mask = unpack(self._masks[expert][tensor].cpu(), self._delta[tensor].shape)
            scale = self._gamma[expert] if tensor in self._rescaled else 1.0
            return torch.where(mask, self._delta[tensor].float().cpu(), 0) * scale
        if tensor in self._private[expert]:
            return (self._private[expert][tensor].float() - self._unowned[tensor].float()).cpu()
        return None

    def task_weight(self, expert: int, tensor: str) -> Tensor:
        """See `MultiExpertPolicy.task_weight`."""
        delta = self.task_vector(expert, tensor)
        if delta is None:
            return self._live[tensor].float().cpu()
        return self._base.get(tensor, self._unowned.get(tensor)).float().cpu() + delta

    @torch.no_grad()
    def _switch_to_base(self) -> None:
        """Undo the merge in the live weights, for what is read from the base alone."""
        for name, (base, _) in self._outside_masks.items():
            self._live[name].copy_(base)
        for name, value in (self._base | self._unowned).items():
            self._live[name].copy_(value)
        self._at_base = True

    @cached_property
    def _outside_masks(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The base's and the merged value of every tensor that the merge changed for all tasks alike."""
        if not self._merged.base.is_dir() or base_hash(self._merged.base) != self.base_hash:
            raise UserError(
                f"{self._merged.folder} was merged from {self._merged.base}, which is gone or has changed;"
                " this router looks at the base: put it back, or choose another router."
            )
        base = TensorFile(self._merged.base / BASE_WEIGHTS_FILE)
        merged = TensorFile(self._merged.folder / BASE_WEIGHTS_FILE)
        changed = {}
        for name in merged:
            if name not in self._delta and not torch.equal(base[name].to(merged[name].dtype), merged[name]):
                changed[name] = tuple(file[name].to(self._live[name]) for file in (base, merged))
        return changed

    def _read(self, path: Path) -> dict[str, Tensor]:
        """A file's tensors where the live weights are; empty if there is no file."""
        if not path.exists():
            return {}
        return {name: value.to(self._live[name].device) for name, value in TensorFile(path).items()}


def _face(loaded: LoadedPolicy, place: Path) -> LoadedPolicy:
    """The network with the statistics of the expert whose folder is `place`."""
    if not (place / CONTRACT_FILE).exists():
        return loaded
    contract = PolicyContract.load(place)
    require_same_interface(contract, loaded.contract, place.name)
    return with_statistics(loaded, contract.statistics)

"""The live weights of a merge, switched from task to task by their masks.

``Θ_0``, ``α τ_merge`` and the packed masks of every task stay in memory, so that a switch reads nothing from
disk. It writes into the live buffers: a captured graph goes on reading them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from vla.errors import UserError
from vla.experts.lora_expert import BASE_WEIGHTS_FILE, base_hash
from vla.experts.merge import DELTA_FILE, EXPERTS_FOLDER, MASK_FILE, NEGATED_FILE, PRIVATE_FILE
from vla.experts.merged import MergedCheckpoint
from vla.experts.task_masks import signed_update, unpack
from vla.experts.tensor_stream import TensorFile
from vla.kernels.masked_delta_apply import masked_delta_apply


class LiveMerge:
    """`live` maps names to the buffers of a model that holds the merge's ``model.safetensors``.

    Everything needed for switches is held on the devices of those buffers.
    """

    def __init__(self, merged: MergedCheckpoint, live: Mapping[str, Tensor]):
        self.merged, self.live = merged, live
        places = [merged.folder / EXPERTS_FOLDER / name for name in merged.experts]
        self._masks = [self._read(place / MASK_FILE) for place in places]
        self._negated = [self._read(place / NEGATED_FILE) for place in places]
        self._private = [self._read(place / PRIVATE_FILE) for place in places]
        self._delta = self._read(merged.folder / DELTA_FILE)
        base = TensorFile(merged.base / BASE_WEIGHTS_FILE) if self._delta else {}
        self._base = {name: base[name].to(live[name].device) for name in self._delta}
        self._scales = [
            {name: merged.scale(expert, name) for name in self._delta} for expert in merged.experts
        ]
        owned = {name for private in self._private for name in private}
        # What a task without a version of its own has there: the file's, which is the base's.
        self._unowned = {name: live[name].clone() for name in sorted(owned)}
        self._task: int | None = None
        self._at_base = False

    @property
    def private(self) -> frozenset[str]:
        """Tensors of which some task has a version of its own."""
        return frozenset(self._unowned)

    @torch.no_grad()
    def switch(self, expert: int) -> None:
        """Make the live weights those of one task: ``Θ_0 + γ_m S_m ⊙ α τ_merge``, and its private tensors."""
        if self._at_base:
            for name, (_, merged) in self._outside_masks.items():
                self.live[name].copy_(merged)
        if self._at_base or expert != self._task:
            for name, delta in self._delta.items():
                self._apply(expert, name, delta)
            for name, unowned in self._unowned.items():
                self.live[name].copy_(self._private[expert].get(name, unowned))
        self._task, self._at_base = expert, False

    def _apply(self, expert: int, name: str, delta: Tensor) -> None:
        """Write one masked tensor of a task: see `vla.experts.task_masks.signed_update`."""
        mask, scale = self._masks[expert][name], self._scales[expert][name]
        negated = self._negated[expert].get(name)
        live = self.live[name]
        plain = mask if negated is None else mask & ~negated
        masked_delta_apply(live, self._base[name], delta, plain, scale)
        if negated is not None:  # each goes to entries that still hold the base's value, so all round once
            masked_delta_apply(live, live, delta, negated & ~mask, -scale)
            masked_delta_apply(live, live, delta, negated & mask, 2 * scale)

    @torch.no_grad()
    def switch_to_base(self) -> None:
        """Undo the merge in the live weights; raises `UserError` if the base is gone."""
        if self._at_base:
            return
        for name, (base, _) in self._outside_masks.items():
            self.live[name].copy_(base)
        for name, value in (self._base | self._unowned).items():
            self.live[name].copy_(value)
        self._at_base = True

    def task_vector(self, expert: int, tensor: str) -> Tensor | None:
        """What the task has of its own in one tensor, float32 on the CPU, or None."""
        if tensor in self._delta:
            delta = self._delta[tensor].cpu()
            packed = [masks[expert].get(tensor) for masks in (self._masks, self._negated)]
            unpacked = [None if bits is None else unpack(bits.cpu(), delta.shape) for bits in packed]
            return signed_update(delta, *unpacked) * self._scales[expert][tensor]
        if tensor in self._private[expert]:
            return (self._private[expert][tensor].float() - self._unowned[tensor].float()).cpu()
        return None

    def task_weight(self, expert: int, tensor: str) -> Tensor:
        """The task's tensor, float32 on the CPU."""
        delta = self.task_vector(expert, tensor)
        if delta is not None:
            held = self._base if tensor in self._base else self._unowned
            return held[tensor].float().cpu() + delta
        return self._unowned.get(tensor, self.live[tensor]).float().cpu()

    @cached_property
    def _outside_masks(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The base's and the merged value of every tensor that the merge changed for all tasks alike."""
        folder, base = self.merged.folder, self.merged.base
        if not base.is_dir() or base_hash(base) != self.merged.manifest["base"]["sha256"]:
            raise UserError(
                f"{folder} was merged from {base}, which is gone or has changed; this router looks at it:"
                " put it back, or choose another router."
            )
        files = [TensorFile(place / BASE_WEIGHTS_FILE) for place in (base, folder)]
        changed = {}
        for name in files[1]:
            before, after = (file[name] for file in files)
            if name not in self._delta and not torch.equal(before.to(after.dtype), after):
                changed[name] = (before.to(self.live[name]), after.to(self.live[name]))
        return changed

    def _read(self, path: Path) -> dict[str, Tensor]:
        """A file's tensors where the live weights are; empty if there is no file."""
        if not path.exists():
            return {}
        return {name: value.to(self.live[name].device) for name, value in TensorFile(path).items()}

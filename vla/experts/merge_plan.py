"""What happens to each tensor of a merge, decided and checked before anything is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from vla.errors import UserError, nearest
from vla.experts.lora_expert import BASE_WEIGHTS_FILE, CONFIG_FILE, TENSORS_FILE, LoraExpert, base_hash
from vla.experts.low_rank import LowRank
from vla.experts.recipe import Recipe, Setting
from vla.experts.tensor_stream import TensorFile, file_hash

COPY, AVERAGE, PRIVATE, MERGE = "copied", "averaged", "private", "merged"


@dataclass(frozen=True)
class Step:
    """One tensor: `kind` is one of this module's constants, `setting` is there if it is merged.

    `dtype` is that of the written tensor, `shape` that of the base's.
    """

    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    setting: Setting | None = None

    @property
    def masked(self) -> bool:
        """Whether tasks have masks on it."""
        return self.setting is not None and self.setting.masked


@dataclass(frozen=True)
class Inputs:
    """The verified inputs of a merge; tensors are read when asked for. `hashes` is for the manifest."""

    base: TensorFile
    base_hash: str
    experts: tuple[LoraExpert, ...]
    weights: tuple[float, ...]
    hashes: tuple[dict[str, str | int | None], ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The experts' names, in the recipe's order."""
        return tuple(expert.name for expert in self.experts)

    @cached_property
    def _low_rank(self) -> tuple[frozenset[str], ...]:
        return tuple(frozenset(expert.modules) for expert in self.experts)

    @cached_property
    def _full(self) -> tuple[frozenset[str], ...]:
        return tuple(frozenset(expert.full_tensors) for expert in self.experts)

    def low_rank(self, m: int, tensor: str) -> bool:
        """Whether expert `m` has LoRA factors on `tensor`."""
        return tensor.endswith(".weight") and tensor.removesuffix(".weight") in self._low_rank[m]

    def full(self, m: int, tensor: str) -> bool:
        """Whether expert `m` trained `tensor` in full."""
        return tensor in self._full[m]

    def touches(self, expert: str, tensor: str) -> bool:
        """Whether the expert of that name changed `tensor` in either way."""
        m = self.names.index(expert)
        return self.low_rank(m, tensor) or self.full(m, tensor)

    def updates(self, tensor: str, shape: Sequence[int]) -> list[LowRank]:
        """Every expert's update of `tensor`, of rank 0 where an expert left it alone."""
        return [
            expert.update(tensor.removesuffix(".weight")) if self.low_rank(m, tensor) else LowRank.zero(shape)
            for m, expert in enumerate(self.experts)
        ]

    def own_weights(self, expert: str, tensor: str, base: Tensor) -> Tensor:
        """The tensor as this expert alone has it."""
        m = self.names.index(expert)
        if self.full(m, tensor):
            return self.experts[m].tensors[tensor]
        return base.float() + self.experts[m].update(tensor.removesuffix(".weight")).dense()


def open_inputs(recipe: Recipe) -> Inputs:
    """Open base and experts; raises `UserError` if an expert was not trained on this base."""
    base = base_hash(recipe.base)
    experts = tuple(LoraExpert.load(entry.path) for entry in recipe.experts)
    for expert in experts:
        expert.require_base(base, recipe.base)
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", expert.name):
            raise UserError(f"The expert's name '{expert.name}' is no folder name; declare it again.")
    names = [expert.name for expert in experts]
    repeated = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if repeated:
        raise UserError(f"Two experts are named '{repeated}'; list each once, or declare one anew.")
    return Inputs(
        base=TensorFile(recipe.base / BASE_WEIGHTS_FILE),
        base_hash=base,
        experts=experts,
        weights=tuple(entry.weight for entry in recipe.experts),
        hashes=tuple(_hashes(entry.path, e) for entry, e in zip(recipe.experts, experts, strict=True)),
    )


def make_plan(recipe: Recipe, inputs: Inputs) -> dict[str, Step]:
    """Decide every tensor of the base, in the order in which they are written: wide dtypes first, by name.

    Raises `UserError` if an expert does not fit the base, a glob matches nothing, a tensor that was trained
    in full is neither shared nor private, shared parameters come from different initialisations, or weights
    are given to a method that takes none.
    """
    touched = _touched(inputs)
    for glob in recipe.globs:
        if not any(fnmatchcase(name, glob) for name in touched):
            raise UserError(
                f"The glob '{glob}' matches no tensor that an expert changed.{nearest(glob, touched)}"
            )
    steps = {name: _step(name, recipe, inputs, touched.get(name)) for name in inputs.base}
    if any(step.kind == AVERAGE for step in steps.values()):
        _require_one_initialisation(inputs)
    return dict(sorted(steps.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def _touched(inputs: Inputs) -> dict[str, bool]:
    """Map each tensor that an expert changed to whether it was trained in full; refuse what does not fit."""
    touched: dict[str, bool] = {}
    shapes = inputs.base.shapes
    for expert in inputs.experts:
        expert.require_fits(shapes)
        full = set(expert.full_tensors)
        for name in (*(f"{module}.weight" for module in expert.modules), *expert.full_tensors):
            if touched.setdefault(name, name in full) != (name in full):
                raise UserError(
                    f"'{name}' has LoRA factors in one expert and was trained in full in another; train them"
                    " alike."
                )
    return touched


def _step(name: str, recipe: Recipe, inputs: Inputs, in_full: bool | None) -> Step:
    slot = inputs.base.slots[name]
    dtype = recipe.dtype if recipe.dtype and slot.dtype.is_floating_point else slot.dtype
    shape = slot.shape
    if in_full is None:
        return Step(COPY, dtype, shape)
    if recipe.is_private(name):
        return Step(PRIVATE, dtype, shape)
    if recipe.is_shared(name):
        _require_averageable(name, inputs, in_full, slot.dtype)
        return Step(AVERAGE, dtype, shape)
    if in_full:
        raise UserError(
            f"'{name}' was trained in full, without a pretrained origin to merge around; list it under shared"
            " or private in the recipe."
        )
    setting = recipe.setting(name)
    if not setting.method.takes_weights and any(weight != 1 for weight in inputs.weights):
        raise UserError(
            f"The method of '{name}' takes no weights, but the recipe gives some; remove them or choose"
            " another method there."
        )
    return Step(MERGE, dtype, shape, setting)


def _require_averageable(name: str, inputs: Inputs, in_full: bool, dtype: torch.dtype) -> None:
    if not in_full:
        raise UserError(
            f"'{name}' has LoRA factors and cannot be shared; override its method with weighted_average."
        )
    if not dtype.is_floating_point:
        raise UserError(f"'{name}' holds whole numbers and cannot be averaged; list it under private.")
    lacking = [expert for m, expert in enumerate(inputs.names) if not inputs.full(m, name)]
    if lacking:
        raise UserError(f"'{name}' is shared but the expert '{lacking[0]}' lacks it; list it under private.")


def _require_one_initialisation(inputs: Inputs) -> None:
    """Without a seed of its own an expert's head starts from the base's, and all have one base."""
    seeds = {expert.name: expert.card.head_seed for expert in inputs.experts}
    if len(set(seeds.values())) > 1:
        listed = ", ".join(f"{name} {'none' if seed is None else seed}" for name, seed in seeds.items())
        raise UserError(
            "Averaging shared parameters needs experts of one head initialisation, but their head seeds are"
            f" {listed}; train them from the same seed, or list those parameters under private."
        )


def _hashes(folder: Path, expert: LoraExpert) -> dict[str, str | int | None]:
    return {
        "head_seed": expert.card.head_seed,
        TENSORS_FILE: file_hash(folder / TENSORS_FILE),
        CONFIG_FILE: file_hash(folder / CONFIG_FILE),
    }

"""``vla merge``: base and experts, streamed tensor by tensor into one ordinary checkpoint.

The folder that it writes::

    model.safetensors                 Θ_0 + α τ_merge, shared parameters averaged: loads like any checkpoint
    config.json, contract.json, ...   the base's, unchanged
    delta.safetensors                 α τ_merge of the masked tensors (only with task masks)
    experts/NAME/mask.safetensors     S_m, one bit per weight: where the task uses α τ_merge
    experts/NAME/negated.safetensors  one bit more: where it uses -α τ_merge or, if in S_m too, 2 α τ_merge
    experts/NAME/private.safetensors  what expert NAME keeps for itself, in place of the merged tensors
    experts/NAME/expert.json          its card; contract.json, if there is one, its normalisation statistics
    recipe.yaml, merge.json           what was merged, hashes of inputs and outputs, mask ratios, factors

`vla.experts.merged.MergedCheckpoint` gives the weights of one task. Memory: one tensor of every expert at
a time. Tensor order, accumulation order and random numbers are fixed, so the same inputs give the same bits.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from vla.atomic import whole_folder, write_text
from vla.errors import UserError
from vla.experts.lora_expert import BASE_WEIGHTS_FILE, save_card
from vla.experts.low_rank import LowRank
from vla.experts.memory import return_freed_memory
from vla.experts.merge_plan import AVERAGE, COPY, PRIVATE, Inputs, Step, make_plan, open_inputs
from vla.experts.merging.method import MergeMethod, Survey, TensorContext
from vla.experts.merging.weighted_average import weighted_average
from vla.experts.recipe import Recipe, load_recipe
from vla.experts.task_masks import (
    MaskRatios,
    magnitudes,
    pack,
    projection_scale,
    scale_factor,
    unaligned,
    used_entries,
)
from vla.experts.tensor_stream import Slot, TensorWriter
from vla.json_file import load_json

MERGE_FILE = "merge.json"
MERGE_VERSION = 3
# 1 had no factors per tensor and no negated masks, 2 no doubled entries.
READABLE_VERSIONS = (1, 2, MERGE_VERSION)
RECIPE_FILE = "recipe.yaml"
DELTA_FILE = "delta.safetensors"
EXPERTS_FOLDER = "experts"
MASK_FILE = "mask.safetensors"
NEGATED_FILE = "negated.safetensors"
PRIVATE_FILE = "private.safetensors"
_BASE_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class MergeConfig:
    """Merge LoRA experts into one checkpoint, or update a merge."""

    recipe: Annotated[Path, tyro.conf.Positional]
    """YAML recipe; `vla.experts.recipe` describes it. With --add or --remove, the folder of a merge."""
    out: Path | None = None
    """Folder of the merged checkpoint; an earlier merge there is replaced. An update stays in its folder."""
    add: tuple[Path, ...] = ()
    """Folders of experts to add to the merge, after those that it has."""
    remove: tuple[str, ...] = ()
    """Names of experts to take out of the merge."""


def run_merge(config: MergeConfig) -> None:
    """Merge as the recipe says, or update a merge, and print what came out."""
    if config.add or config.remove:
        from vla.experts.merge_update import updated_recipe

        recipe, out = updated_recipe(config.recipe, config.add, config.remove), config.out or config.recipe
    elif config.out is None:
        raise UserError("--out is missing: name the folder of the merged checkpoint.")
    else:
        recipe, out = load_recipe(config.recipe), config.out
    _print_merge(merge(recipe, out), out)


def _print_merge(manifest: Mapping[str, Any], out: Path) -> None:
    print(f"{out}: " + ", ".join(f"{n} {kind}" for kind, n in manifest["tensors"].items()))
    if manifest["masks"]:
        real, null = manifest["masks"]["experts"], manifest["masks"]["null_model"]
        for name, ratio in real["keep"].items():
            beside = f" (null model {null['keep'][name]:.1%})" if null else ""
            print(f"  {name} keeps {ratio:.1%} of the merged weights{beside}")
        beside = f" (null model {null['selfish']:.1%})" if null else ""
        print(f"  used by exactly one task: {real['selfish']:.1%}{beside}")


def merge(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Merge into the folder `out`, whole or not at all, and return the manifest.

    Raises `UserError` if the inputs do not fit each other or the recipe, or if `out` is not free.
    """
    out = Path(out)
    _require_free(out, recipe)
    return_freed_memory()
    inputs = open_inputs(recipe)
    plan = make_plan(recipe, inputs)
    surveys = _survey(plan, inputs)
    with whole_folder(out) as staging:
        _copy_base_files(recipe.base, staging, recipe)
        for name, expert in zip(inputs.names, inputs.experts, strict=True):
            (staging / EXPERTS_FOLDER / name).mkdir(parents=True)
            save_card(staging / EXPERTS_FOLDER / name, expert.card)
            if expert.contract:
                expert.contract.save(staging / EXPERTS_FOLDER / name)
        stream = _Stream(recipe, inputs, plan, surveys)
        outputs = stream.write(staging)
        write_text(staging / RECIPE_FILE, recipe.text)
        manifest = _manifest(recipe, inputs, plan, stream, outputs)
        manifest["base"]["place"] = os.path.relpath(recipe.base.resolve(), out.resolve())
        write_text(staging / MERGE_FILE, json.dumps(manifest, indent=2) + "\n")
    return manifest


def _survey(plan: Mapping[str, Step], inputs: Inputs) -> dict[MergeMethod, Survey | None]:
    """Gather global terms: over all tensors that are merged by the same method with the same options."""
    groups: dict[MergeMethod, list[str]] = {}
    for name, step in plan.items():
        if step.setting:
            groups.setdefault(step.setting.method, []).append(name)
    surveys = {method: method.start_survey(len(inputs.experts)) for method in groups}
    for method, survey in surveys.items():
        while survey is not None and not survey.done:
            for name in groups[method]:
                survey.observe(inputs.updates(name, plan[name].shape))
            survey.finish_pass()
    return surveys


class _Stream:
    """The pass that writes: every tensor once, in the order of the plan."""

    def __init__(
        self,
        recipe: Recipe,
        inputs: Inputs,
        plan: Mapping[str, Step],
        surveys: Mapping[MergeMethod, Survey | None],
    ):
        self.recipe, self.inputs, self.plan, self.surveys = recipe, inputs, plan, surveys
        count = len(inputs.experts)
        self.ratios, self.null_ratios = MaskRatios(count), MaskRatios(count)
        self.rescaled: list[str] = []
        self.projected: dict[str, dict[str, float]] = {}
        # Σ|τ_m| and Σ|S_m τ_merge| of every expert, for a method's own scale.
        self._norms = [[0.0, 0.0] for _ in inputs.experts]

    @property
    def rescale(self) -> dict[str, float]:
        """EMR's ``γ_m`` per expert; empty if no tensor is rescaled."""
        if not self.rescaled:
            return {}
        return {
            name: scale_factor(own, used)
            for name, (own, used) in zip(self.inputs.names, self._norms, strict=True)
        }

    def write(self, staging: Path) -> dict[str, str]:
        """Write all tensor files and return their hashes by path."""
        with ExitStack() as stack:
            self.writers: dict[str, TensorWriter] = {}
            for path, layout in self._layouts().items():
                shapes = {}
                if path.endswith((MASK_FILE, NEGATED_FILE)):
                    shapes = {"shapes": json.dumps({name: self.plan[name].shape for name in layout})}
                self.writers[path] = TensorWriter(staging / path, layout, shapes)
                stack.callback(self.writers[path].abandon)
            for name, step in self.plan.items():
                self._write_tensor(name, step)
            return {path: writer.close() for path, writer in self.writers.items()}

    def _layouts(self) -> dict[str, dict[str, Slot]]:
        """Which tensor goes to which file; files that would be empty are left out."""
        layouts = {
            BASE_WEIGHTS_FILE: {name: Slot(step.dtype, step.shape) for name, step in self.plan.items()}
        }
        masked = [name for name, step in self.plan.items() if step.masked]
        layouts[DELTA_FILE] = {name: layouts[BASE_WEIGHTS_FILE][name] for name in masked}
        for expert in self.inputs.names:
            bits = {
                name: Slot(torch.uint8, ((torch.Size(self.plan[name].shape).numel() + 7) // 8,))
                for name in masked
            }
            layouts[f"{EXPERTS_FOLDER}/{expert}/{MASK_FILE}"] = bits
            layouts[f"{EXPERTS_FOLDER}/{expert}/{NEGATED_FILE}"] = {
                name: slot for name, slot in bits.items() if self.plan[name].setting.method.signed
            }
            layouts[f"{EXPERTS_FOLDER}/{expert}/{PRIVATE_FILE}"] = {
                name: Slot(step.dtype, step.shape)
                for name, step in self.plan.items()
                if step.kind == PRIVATE and self.inputs.touches(expert, name)
            }
        return {path: layout for path, layout in layouts.items() if layout or path == BASE_WEIGHTS_FILE}

    def _write_tensor(self, name: str, step: Step) -> None:
        weights = self.writers[BASE_WEIGHTS_FILE]
        if step.kind == AVERAGE:
            values = (expert.tensors[name].float() for expert in self.inputs.experts)
            weights.write(name, weighted_average(values, self.inputs.weights).to(step.dtype))
            return
        if step.kind == COPY and step.dtype == self.inputs.base.slots[name].dtype:
            weights.copy(name, self.inputs.base)  # embeddings are larger than all that is merged
            return
        base = self.inputs.base[name]
        if step.kind == COPY:
            weights.write(name, base.to(step.dtype))
        elif step.kind == PRIVATE:
            weights.write(name, base.to(step.dtype))
            for expert in self.inputs.names:
                if self.inputs.touches(expert, name):
                    own = self.inputs.own_weights(expert, name, base).to(step.dtype)
                    self.writers[f"{EXPERTS_FOLDER}/{expert}/{PRIVATE_FILE}"].write(name, own)
        else:
            self._write_merged(name, step, base)

    def _write_merged(self, name: str, step: Step, base: Tensor) -> None:
        updates = self.inputs.updates(name, step.shape)
        context = TensorContext(
            name,
            self.inputs.names,
            self.inputs.weights,
            self.recipe.seed,
            self.surveys[step.setting.method],
        )
        merged = _merged(step, updates, context)
        self.writers[BASE_WEIGHTS_FILE].write(name, (base.float() + merged).to(step.dtype))
        del base
        if not step.masked:
            return
        self.writers[DELTA_FILE].write(name, merged.to(step.dtype))
        used = [self._write_masks(name, step, m, update.dense(), merged) for m, update in enumerate(updates)]
        self.ratios.add(used)
        if step.setting.method.own_scale:
            self.rescaled.append(name)
        if self.recipe.null_model:
            del merged, used
            updates = [LowRank(update.b, update.a) for update in updates]  # lets go of their matrices
            self._count_null_model(step, updates, context)

    def _write_masks(self, name: str, step: Step, m: int, delta: Tensor, merged: Tensor) -> Tensor:
        """Write one expert's masks and note its factors; return which entries it uses, in any way."""
        expert = self.inputs.names[m]
        mask, negated = step.setting.task_bits(delta, merged)
        if step.setting.method.own_scale:
            self._norms[m] = [
                a + b for a, b in zip(self._norms[m], magnitudes(delta, merged, mask), strict=True)
            ]
        if step.setting.rescale:
            scale = projection_scale(delta, merged, mask, negated)
            self.projected.setdefault(expert, {})[name] = scale
        self.writers[f"{EXPERTS_FOLDER}/{expert}/{MASK_FILE}"].write(name, pack(mask))
        if negated is not None:
            self.writers[f"{EXPERTS_FOLDER}/{expert}/{NEGATED_FILE}"].write(name, pack(negated))
        return used_entries(mask, negated)

    def _count_null_model(self, step: Step, updates: Sequence[LowRank], context: TensorContext) -> None:
        shuffled = [
            unaligned(update, context.generator(f"null model of {expert}"))
            for update, expert in zip(updates, context.experts, strict=True)
        ]
        merged = _merged(step, shuffled, context)
        self.null_ratios.add(
            [used_entries(*step.setting.task_bits(update.dense(), merged)) for update in shuffled]
        )


def _merged(step: Step, updates: Sequence[LowRank], context: TensorContext) -> Tensor:
    """``α τ_merge`` of one tensor, float32; raises `UserError` if it is not finite."""
    merged = step.setting.method.merge(updates, context).mul_(step.setting.alpha)
    low, high = merged.aminmax()  # without the temporaries of `isfinite`; NaN wins both
    if not (low.isfinite() and high.isfinite()):
        raise UserError(f"Merging '{context.tensor}' gave values that are not finite; lower its alpha.")
    return merged


def _require_free(out: Path, recipe: Recipe) -> None:
    inputs = [recipe.base, *(entry.path for entry in recipe.experts)]
    if any(out.resolve() == path.resolve() for path in inputs):
        raise UserError(f"The output folder {out} is one of the recipe's inputs; choose another.")
    if out.exists() and not (out / MERGE_FILE).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an earlier merge; choose another output folder.")


def _copy_base_files(base: Path, staging: Path, recipe: Recipe) -> None:
    """Copy what makes the base a checkpoint, apart from its weights and its own merge records."""
    own = {BASE_WEIGHTS_FILE, DELTA_FILE, MERGE_FILE, RECIPE_FILE, _BASE_MANIFEST}
    for path in sorted(base.iterdir()):
        if path.is_file() and path.name not in own:
            shutil.copyfile(path, staging / path.name)
    if (base / _BASE_MANIFEST).is_file():
        facts = load_json(base / _BASE_MANIFEST) | {"choice": "merged", "recipe": recipe.hash}
        write_text(staging / _BASE_MANIFEST, json.dumps(facts, indent=2) + "\n")


def _manifest(
    recipe: Recipe, inputs: Inputs, plan: Mapping[str, Step], stream: _Stream, outputs: Mapping[str, str]
) -> dict[str, Any]:
    kinds = [step.kind for step in plan.values()]
    packages = ("torch", "numpy", "safetensors", "lerobot_policy_cogmerge")
    return {
        "version": MERGE_VERSION,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "recipe": recipe.hash,
        "base": {"path": str(recipe.base.resolve()), "sha256": inputs.base_hash},
        "experts": [
            {"name": name, "path": str(entry.path.resolve()), "weight": entry.weight, **hashes}
            for name, entry, hashes in zip(inputs.names, recipe.experts, inputs.hashes, strict=True)
        ],
        "tensors": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "masks": _mask_report(inputs, stream),
        "rescale": {"experts": stream.rescale, "tensors": stream.rescaled, "per_tensor": stream.projected},
        "outputs": dict(outputs),
    }


def _mask_report(inputs: Inputs, stream: _Stream) -> dict[str, Any] | None:
    if not stream.ratios.entries:
        return None

    def describe(ratios: MaskRatios) -> dict[str, Any] | None:
        if not ratios.entries:
            return None
        keep = dict(zip(inputs.names, ratios.keep_ratios, strict=True))
        return {"keep": keep, "selfish": ratios.selfish_ratio}

    return {"experts": describe(stream.ratios), "null_model": describe(stream.null_ratios)}

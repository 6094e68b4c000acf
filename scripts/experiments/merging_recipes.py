"""The recipes of `scripts/experiment_merging`: every method with and without task masks, and the naive one.

    merging_recipes.py FOLDER --base RUN --experts RUN... [--methods ties ...] [--rescaled ties ...]
        [--lam 0.6] [--private head state_projector]

`naive.yaml` averages everything that the experts changed, heads included: one network for all tasks. All
other recipes keep, as MergeVLA does, a private part of each head (what `vla.policy.head.head_parts` says of
the policy) and average what else was trained in full; the method merges the low-rank updates. Where task
masks are asked for they use MergeVLA's λ; everything else stays at the methods' own defaults. Rescaled
masks (`vla.experts.task_masks.projection_scale`) have no number to choose.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from vla.atomic import write_text
from vla.errors import UserError
from vla.experts.lora_expert import LoraExpert, find_expert
from vla.experts.merging.registry import METHODS, make_method
from vla.policy.checkpoint import load_checkpoint, resolve_checkpoint
from vla.policy.head import head_parts

NAIVE = "naive"
MASKED, TWO_BITS, RESCALED = "+masks", "+two_bits", "+rescaled"
#: What `--private` may name beside the head's own private parts.
PRIVATE_PARTS = {"film": "*film*", "routers": "*routers*", "state_projector": "model.state_projector.*"}


@dataclass(frozen=True)
class Options:
    """Write recipes."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder for NAME.yaml."""
    base: Path
    """The base's training run or checkpoint."""
    experts: tuple[Path, ...]
    """The experts' training runs or folders."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Merging methods."""
    rescaled: tuple[str, ...] = ()
    """Of the methods, those with a recipe of rescaled masks too; and of two bits, where a method has them."""
    lam: float = 0.6
    """Threshold of the task masks."""
    private: tuple[str, ...] = ("head", "state_projector")
    """What each task keeps: head, and film, routers or state_projector too."""
    seed: int = 0
    """Of methods that draw random numbers."""


def write_recipes(options: Options) -> list[str]:
    """Write all recipes and return their names; raises `UserError` for an unknown method or part."""
    for name in options.rescaled:
        make_method(name)
    base = resolve_checkpoint(options.base).resolve()
    folders = [(find_expert(path) or path).resolve() for path in options.experts]
    full = sorted({name for path in folders for name in LoraExpert.load(path).full_tensors})
    factored = {f"{module}.weight" for path in folders for module in LoraExpert.load(path).modules}
    kept = _private_globs(base, options.private)
    private = [name for name in full if any(fnmatchcase(name, glob) for glob in kept)]
    common = {
        "version": 1,
        "base": _from(options.out, base),
        "experts": [_from(options.out, folder) for folder in folders],
        "seed": options.seed,
    }
    everything = {"shared": globs_of(full, factored)}
    parts = {
        "shared": globs_of([name for name in full if name not in private], {*factored, *private}),
        "private": globs_of(private, {*factored, *full} - {*private}),
    }
    recipes = {NAIVE: {"method": "weighted_average", **everything}}
    for method in options.methods:
        recipes |= variants(method, options.lam, parts, method in options.rescaled)
    for name, own in recipes.items():
        write_text(options.out / f"{name}.yaml", yaml.safe_dump(common | own, sort_keys=False))
    return list(recipes)


def variants(method: str, lam: float, parts: Mapping[str, Any], rescaled: bool) -> dict[str, dict[str, Any]]:
    """A method's recipes by name; one that defines its own masks has only that one."""
    plain, kind = {"method": method, **parts}, make_method(method)
    masked = plain if kind.own_masks else plain | {"lambda": lam}
    recipes = {} if kind.own_masks else {method: plain}
    recipes[f"{method}{MASKED}"] = masked
    if rescaled and not kind.own_scale:
        recipes[f"{method}{MASKED}{RESCALED}"] = masked | {"rescale": True}
        if hasattr(kind, "bits"):
            two_bits = {"rescale": True, "options": {"bits": 2}}
            recipes[f"{method}{MASKED}{TWO_BITS}{RESCALED}"] = masked | two_bits
    return recipes


def globs_of(names: Sequence[str], others: set[str]) -> list[str]:
    """Globs that match all `names` and none of `others`: numbers of layers become a star where they may."""
    globs = {}
    for name in names:
        glob = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        globs[name if any(fnmatchcase(other, glob) for other in others) else glob] = None
    return list(globs)


def _private_globs(base: Path, parts: Sequence[str]) -> list[str]:
    globs: list[str] = []
    for part in parts:
        if part != "head" and part not in PRIVATE_PARTS:
            raise UserError(f"--private {part} is unknown; choose from head, {', '.join(PRIVATE_PARTS)}.")
        globs += head_parts(load_checkpoint(base).policy).private if part == "head" else [PRIVATE_PARTS[part]]
    return globs


def _from(folder: Path, place: Path) -> str:
    """The way from `folder`, so that recipes move together with what they merge."""
    return os.path.relpath(place, folder.resolve())


if __name__ == "__main__":
    try:
        names = write_recipes(tyro.cli(Options))
        print(f"{len(names)} recipes: {', '.join(names)}")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)

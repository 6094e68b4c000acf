"""Merge recipes: one YAML file says everything that decides the bits of a merged checkpoint.

::

    version: 1
    base: ../nano                      # checkpoint or training run; paths are relative to the recipe
    experts:
      - ../experts/pick                # a PEFT folder with its expert.json, or a training run's newest
      - {path: ../experts/push, weight: 2.0}
    method: ties                       # see vla.experts.merging.registry
    options: {density: 0.2}            # the method's own
    alpha: 1.0                         # Θ = Θ_0 + α τ_merge
    lambda: 0.6                        # task masks; leave out for none
    rescale: true                      # with masks: a factor per task and tensor; see task_masks
    dtype: base                        # of the written weights: base, float32, bfloat16, float16
    seed: 0
    null_model: true                   # report the masks' ratios beside those of shuffled experts
    shared: ["model.head.trunk.*"]     # trained in full: averaged, only between experts of one head seed
    private: ["model.head.out.*"]      # kept per task, not merged; wins over shared
    overrides:                         # per glob on tensor names; the last that matches, over the above
      "model.vision.*": {method: task_arithmetic, alpha: 0.5, lambda: 0.4}

Anything unknown, of the wrong type or repeated is refused.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from vla.errors import UserError, nearest
from vla.experts.lora_expert import BASE_WEIGHTS_FILE, find_expert
from vla.experts.merging.method import MergeMethod
from vla.experts.merging.registry import make_method
from vla.experts.task_masks import task_mask
from vla.run_folder import find_newest

RECIPE_VERSION = 1
DTYPES: dict[str, torch.dtype | None] = {
    "base": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_REQUIRED = ("version", "base", "experts", "method")
_SETTING = ("method", "options", "alpha", "lambda", "rescale")
_KNOWN = (*_REQUIRED, *_SETTING[1:], "dtype", "seed", "null_model", "shared", "private", "overrides")


@dataclass(frozen=True)
class ExpertEntry:
    """One expert of a recipe: its folder and its weight."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Setting:
    """How one tensor is merged: ``Θ_0 + α τ_merge``, masked with `lam`, by the method's own rule, or not.

    `rescale`: whether the masked update has a factor for each task (`task_masks.projection_scale`).
    """

    method: MergeMethod
    alpha: float
    lam: float | None
    rescale: bool = False

    @property
    def masked(self) -> bool:
        """Whether tasks have masks on this tensor."""
        return self.lam is not None or self.method.own_masks

    def task_bits(self, delta: Tensor, merged: Tensor) -> tuple[Tensor, Tensor | None]:
        """The task's mask and, if the method has one, its second bit: see `task_masks.signed_update`.

        Booleans of the shape of both.
        """
        if not self.method.own_masks:
            return task_mask(delta, merged, self.lam), None
        negated = self.method.negated(delta, merged) if self.method.signed else None
        return self.method.mask(delta, merged), negated


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. `text` is the file's content; `hash` its SHA-256."""

    base: Path
    experts: tuple[ExpertEntry, ...]
    default: Setting
    overrides: tuple[tuple[str, Setting], ...]
    shared: tuple[str, ...]
    private: tuple[str, ...]
    dtype: torch.dtype | None
    seed: int
    null_model: bool
    text: str

    @property
    def hash(self) -> str:
        """SHA-256 of the recipe's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def setting(self, tensor: str) -> Setting:
        """The last override whose glob matches the tensor's name, or the recipe's own setting."""
        matching = [setting for glob, setting in self.overrides if fnmatchcase(tensor, glob)]
        return matching[-1] if matching else self.default

    def is_shared(self, tensor: str) -> bool:
        """Whether the tensor is to be averaged."""
        return not self.is_private(tensor) and any(fnmatchcase(tensor, glob) for glob in self.shared)

    def is_private(self, tensor: str) -> bool:
        """Whether each expert keeps its own."""
        return any(fnmatchcase(tensor, glob) for glob in self.private)

    @property
    def globs(self) -> tuple[str, ...]:
        """Every glob in the recipe, to be checked against the tensors that exist."""
        return (*self.shared, *self.private, *(glob for glob, _ in self.overrides))


def load_recipe(path: Path) -> Recipe:
    """Read and validate a recipe; raises `UserError` with one sentence that names the file and the entry."""
    path = Path(path)
    try:
        text = path.read_text()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"There is no recipe {path}.") from None
    return parse_recipe(text, path)


def parse_recipe(text: str, path: Path) -> Recipe:
    """Validate the text of a recipe that stands, or would stand, at `path`; raises as `load_recipe` does."""
    try:
        return _parse(read_yaml(text), path.parent, text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    except UserError as error:
        raise UserError(f"In the recipe {path}: {error}") from None


def read_yaml(text: str) -> Any:
    """The content of a recipe before it is validated; raises `UserError` or `yaml.YAMLError`."""
    return yaml.load(text, Loader=_StrictLoader)


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys and reads ``1e-5`` as the number that it is."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = [key for i, key in enumerate(keys) if key in keys[:i]]
        if repeated:
            raise UserError(f"the key '{repeated[0]}' is given twice; remove one.")
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def _parse(content: Any, folder: Path, text: str) -> Recipe:
    _require_keys(content, _KNOWN, "the recipe")
    absent = [key for key in _REQUIRED if key not in content]
    if absent:
        raise UserError(f"the entries {', '.join(absent)} are missing.")
    if content["version"] != RECIPE_VERSION:
        raise UserError(f"it has version {content['version']!r}, this release reads {RECIPE_VERSION}.")
    dtype = _typed(content, "dtype", str, "base")
    if dtype not in DTYPES:
        raise UserError(f"dtype is '{dtype}'; choose from {', '.join(DTYPES)}.")
    default = _setting(content, content)
    overrides = _typed(content, "overrides", dict, {})
    for glob, override in overrides.items():
        _require_keys(override, _SETTING, f"the override '{glob}'")
    return Recipe(
        base=_base(folder / _typed(content, "base", str, None)),
        experts=_experts(content["experts"], folder),
        default=default,
        overrides=tuple((str(glob), _setting(override, content)) for glob, override in overrides.items()),
        shared=_globs(content, "shared"),
        private=_globs(content, "private"),
        dtype=DTYPES[dtype],
        seed=_typed(content, "seed", int, 0),
        null_model=_typed(content, "null_model", bool, True),
        text=text,
    )


def _setting(entry: Mapping[str, Any], top: Mapping[str, Any]) -> Setting:
    """Parse one setting over the top-level one; options belong to a method and are not taken to another."""
    name = _typed(entry, "method", str, top["method"])
    options = _typed(entry, "options", dict, {})
    if name == top["method"]:
        options = _typed(top, "options", dict, {}) | options
    method = make_method(name, options)
    if method.own_masks and entry.get("lambda") is not None:
        raise UserError(f"the method '{name}' has its own masks and takes no lambda; remove it.")
    lam = _number(entry, "lambda", _number(top, "lambda", None))
    if lam is not None and lam < 0:
        raise UserError(f"lambda is {lam}; it must be 0 or more.")
    alpha = _number(entry, "alpha", _number(top, "alpha", 1.0))
    lam = None if method.own_masks else lam
    rescale = _typed(entry, "rescale", bool, _typed(top, "rescale", bool, False))
    scalable = (lam is not None or method.own_masks) and not method.own_scale
    if entry.get("rescale") and not scalable:
        why = "rescales in its own way" if method.own_scale else "has no masks here; give a lambda"
        raise UserError(f"rescale has nothing to do: the method '{name}' {why}.")
    return Setting(method, alpha, lam, rescale and scalable)


def _base(path: Path) -> Path:
    return find_newest(path, BASE_WEIGHTS_FILE) or path


def _experts(entries: Any, folder: Path) -> tuple[ExpertEntry, ...]:
    if not isinstance(entries, list) or not entries:
        raise UserError("experts must be a list of at least one folder.")
    experts = []
    for entry in entries:
        entry = {"path": entry} if isinstance(entry, str) else entry
        _require_keys(entry, ("path", "weight"), "an expert")
        if not isinstance(entry.get("path"), str):
            raise UserError(f"the expert {entry!r} has no path.")
        expert = find_expert(folder / entry["path"]) or folder / entry["path"]
        experts.append(ExpertEntry(expert, _number(entry, "weight", 1.0)))
    return tuple(experts)


def _require_keys(content: Any, known: tuple[str, ...], what: str) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{what} must be a mapping, not {content!r}.")
    for key in content:
        if key not in known:
            raise UserError(
                f"{what} has no entry '{key}'.{nearest(str(key), known)} It may have: {', '.join(known)}."
            )


def _typed(content: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = content.get(key, default)
    if type(value) is not kind:
        raise UserError(f"{key} is {value!r}; a {_WORDS[kind]} is needed.")
    return value


_WORDS = {str: "text", int: "whole number", bool: "true or false", dict: "mapping", list: "list"}


def _number(content: Mapping[str, Any], key: str, default: float | None) -> float | None:
    value = content.get(key, default)
    if value is None and key == "lambda":
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"{key} is {value!r}; a finite number is needed.")
    return float(value)


def _globs(content: Mapping[str, Any], key: str) -> tuple[str, ...]:
    globs = _typed(content, key, list, [])
    if not all(isinstance(glob, str) for glob in globs):
        raise UserError(f"{key} is {globs!r}; a list of globs on tensor names is needed.")
    return tuple(globs)

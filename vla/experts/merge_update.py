"""``vla merge DIR --add EXPERT`` and ``--remove NAME``: another set of experts, the same recipe.

An update is a merge anew with the recipe that DIR was made with and another list of experts: the same bits as
if that list had been there from the start. What it needs of the experts that stay are their factors, where
DIR's manifest says that they lie; nobody's training data. Adding to the result in place of merging anew could
not keep the bits (sums in another order) and, for most methods, not even the equations: signs, thresholds and
subspaces are those of all experts together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vla.errors import UserError, nearest
from vla.experts.lora_expert import CONFIG_FILE, TENSORS_FILE
from vla.experts.merge import RECIPE_FILE
from vla.experts.merged import MergedCheckpoint
from vla.experts.recipe import Recipe, parse_recipe, read_yaml
from vla.experts.tensor_stream import file_hash


def updated_recipe(folder: Path, add: Sequence[Path], remove: Sequence[str]) -> Recipe:
    """The recipe of the merge in `folder` with experts removed by name and others added at the end.

    Its paths are absolute, so that it can be used from anywhere; comments of the old one are lost. Raises
    `UserError` if `folder` is no merge, a name is not in it, an expert that stays is gone or has changed, or
    nobody would be left.
    """
    merged = MergedCheckpoint.open(folder)
    for name in remove:
        if name not in merged.experts:
            raise UserError(
                f"{folder} has no expert '{name}' to remove.{nearest(name, merged.experts)} It has:"
                f" {', '.join(merged.experts)}."
            )
    staying = [expert for expert in merged.manifest["experts"] if expert["name"] not in remove]
    if not staying and not add:
        raise UserError(f"Nobody would be left in {folder}; keep at least one expert.")
    for expert in staying:
        _require_unchanged(expert, folder)
    content = read_yaml(_recipe_text(merged)) | {
        "base": merged.manifest["base"]["path"],
        "experts": [*map(_entry, staying), *(str(Path(path).resolve()) for path in add)],
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return parse_recipe(text, Path(folder) / RECIPE_FILE)


def _recipe_text(merged: MergedCheckpoint) -> str:
    path = merged.folder / RECIPE_FILE
    if not path.is_file() or file_hash(path) != merged.manifest["recipe"]:
        raise UserError(
            f"{path} is not the recipe that {merged.folder} was merged with; merge anew from one."
        )
    return path.read_text()


def _require_unchanged(expert: Mapping[str, Any], folder: Path) -> None:
    for file in (TENSORS_FILE, CONFIG_FILE):
        path = Path(expert["path"]) / file
        if not path.is_file() or file_hash(path) != expert[file]:
            raise UserError(
                f"The expert '{expert['name']}' of {folder} is gone from {expert['path']} or has changed"
                f" ({file}); put it back, or --remove it."
            )


def _entry(expert: Mapping[str, Any]) -> str | dict[str, Any]:
    if expert["weight"] == 1:
        return expert["path"]
    return {"path": expert["path"], "weight": expert["weight"]}

"""The weights of one task in a merged checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vla.contract import CONTRACT_FILE
from vla.errors import UserError, nearest
from vla.experts.lora_expert import BASE_WEIGHTS_FILE, base_hash
from vla.experts.merge import (
    DELTA_FILE,
    EXPERTS_FOLDER,
    MASK_FILE,
    MERGE_FILE,
    NEGATED_FILE,
    PRIVATE_FILE,
    READABLE_VERSIONS,
)
from vla.experts.task_masks import signed_update, unpack
from vla.experts.tensor_stream import TensorFile, file_hash
from vla.json_file import load_json


@dataclass(frozen=True)
class MergedCheckpoint:
    """A folder written by ``vla merge``. `base` is the base's folder, needed if there are masks."""

    folder: Path
    base: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path, base: Path | None = None) -> MergedCheckpoint:
        """Open a merge; `base` says where the base is, if not where it was, seen from the merge or at all.

        Raises `UserError` if `folder` is no merge, or if it has masks and the base is absent or another.
        """
        folder = Path(folder)
        if not (folder / MERGE_FILE).is_file():
            raise UserError(f"{folder} is not a merged checkpoint: it holds no {MERGE_FILE}.")
        manifest = load_json(folder / MERGE_FILE)
        if manifest.get("version") not in READABLE_VERSIONS:
            raise UserError(
                f"{folder / MERGE_FILE} has version {manifest.get('version')!r}, this release reads"
                f" {', '.join(map(str, READABLE_VERSIONS))}."
            )
        return cls(folder, _find_base(folder, manifest["base"], base), manifest)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(expert["name"] for expert in self.manifest["experts"])

    @property
    def hash(self) -> str:
        """SHA-256 over the hashes of everything that the merge wrote, its factors per tensor and its base."""
        content = {"base": self.manifest["base"]["sha256"], "outputs": self.manifest["outputs"]}
        if factors := self.manifest["rescale"].get("per_tensor"):
            content["rescale"] = factors
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        for path in sorted(self.folder.rglob(CONTRACT_FILE)):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def verify(self) -> None:
        """Raise `UserError` if a tensor file is not what the merge wrote."""
        for file, expected in self.manifest["outputs"].items():
            if not (self.folder / file).is_file() or file_hash(self.folder / file) != expected:
                raise UserError(f"{self.folder / file} is not what the merge wrote; merge again.")

    def scale(self, expert: str, tensor: str) -> float:
        """``γ_m`` of a masked tensor: EMR's own per expert, the recipe's `rescale` per tensor too, or 1."""
        told = self.manifest["rescale"]
        if tensor in told["tensors"]:
            return told["experts"][expert]
        return told.get("per_tensor", {}).get(expert, {}).get(tensor, 1.0)  # merges of earlier releases: none

    def task_weights(self, expert: str) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor in which the task differs from ``model.safetensors``, in that file's dtypes.

        ``Θ_0 + γ_m S_m ⊙ α τ_merge`` where there are masks, and what the expert kept for itself. Raises
        `UserError` for an unknown expert.
        """
        if expert not in self.experts:
            raise UserError(
                f"{self.folder} has no expert '{expert}'.{nearest(expert, self.experts)} It has:"
                f" {', '.join(self.experts)}."
            )
        own = self.folder / EXPERTS_FOLDER / expert
        if (own / MASK_FILE).exists():
            yield from self._masked(expert, own)
        if (own / PRIVATE_FILE).exists():
            yield from TensorFile(own / PRIVATE_FILE).items()

    def _masked(self, expert: str, own: Path) -> Iterator[tuple[str, Tensor]]:
        base, deltas = TensorFile(self.base / BASE_WEIGHTS_FILE), TensorFile(self.folder / DELTA_FILE)
        masks = TensorFile(own / MASK_FILE)
        turned = TensorFile(own / NEGATED_FILE) if (own / NEGATED_FILE).exists() else {}
        shapes = json.loads(masks.metadata["shapes"])
        for name in masks:
            delta, mask = deltas[name], unpack(masks[name], shapes[name])
            negated = unpack(turned[name], shapes[name]) if name in turned else None
            update = signed_update(delta, mask, negated).mul_(self.scale(expert, name))
            yield name, (base[name].float() + update).to(delta.dtype)


def _find_base(folder: Path, told: Mapping[str, Any], named: Path | None) -> Path:
    """Where the base is; with masks, which change its weights, the place that holds the right ones."""
    places = [folder / told["place"]] if "place" in told else []  # merges of earlier releases tell none
    places = [Path(named)] if named else [*places, Path(told["path"])]
    found = [place.resolve() for place in places if (place / BASE_WEIGHTS_FILE).is_file()]
    if not (folder / DELTA_FILE).exists():
        return found[0] if found else places[-1]
    for place in dict.fromkeys(found):
        if base_hash(place) == told["sha256"]:
            return place
    raise UserError(
        f"{places[-1]} is not the base that {folder} was merged from; put that back, or merge again."
    )

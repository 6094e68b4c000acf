"""The expert bank on disk: a reference to a base, and the experts' folders.

::

    bank.json                 the base's place and hashes, the experts and their hashes
    experts/NAME/             an expert's folder as it was trained (PEFT's format, card, contract)

An expert is copied in, so that a bank and its base can be moved together; the base is not, as many banks may
share one. Nothing but ``bank.json`` and the folder of the expert in question is written when one comes or
goes. ``bank.json`` names an expert only while its folder is whole: a kill leaves the bank of before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from vla.atomic import whole_folder, write_text
from vla.contract import CONTRACT_FILE, PolicyContract
from vla.errors import UserError, nearest
from vla.experts.lora_expert import (
    BASE_WEIGHTS_FILE,
    CARD_FILE,
    CONFIG_FILE,
    TENSORS_FILE,
    LoraExpert,
    find_expert,
    save_card,
)
from vla.experts.tensor_stream import TensorFile, file_hash
from vla.json_file import load_json

BANK_FILE = "bank.json"
BANK_VERSION = 1
EXPERTS_FOLDER = "experts"
#: What decides how the base and an expert act; the rest of their folders is the story of their training.
_BASE_FILES = (BASE_WEIGHTS_FILE, "config.json", CONTRACT_FILE)
_EXPERT_FILES = (TENSORS_FILE, CONFIG_FILE, CARD_FILE, CONTRACT_FILE)


@dataclass(frozen=True)
class BankFolder:
    """A bank as its ``bank.json`` describes it.

    `base` is the base checkpoint's folder, `base_hashes` and `expert_hashes` (by expert, in the order in
    which they came) map file names to SHA-256.
    """

    folder: Path
    base: Path
    base_hashes: Mapping[str, str]
    expert_hashes: Mapping[str, Mapping[str, str]]

    @classmethod
    def create(cls, folder: Path, base: Path, experts: Sequence[Path] = ()) -> BankFolder:
        """Make a bank on the checkpoint `base`, with `experts` to begin with, whole or not at all.

        Raises `UserError` if `folder` holds anything, and as `add` does.
        """
        folder, base = Path(folder), Path(base)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is not an empty folder; choose another place for the bank.")
        if not (base / BASE_WEIGHTS_FILE).is_file():
            raise UserError(f"{base} is not a base checkpoint: it holds no {BASE_WEIGHTS_FILE}.")
        with whole_folder(folder) as staging:  # beside `folder`, so the way from it to the base is the same
            bank = cls(staging, base, _hashes(base, _BASE_FILES), {})._save()
            for expert in experts:
                bank = bank.add(expert)
        return replace(bank, folder=folder)

    @classmethod
    def open(cls, folder: Path, base: Path | None = None) -> BankFolder:
        """Read ``bank.json``; `base` says where the base is, if not where it was.

        Raises `UserError` if there is none, or it is malformed, or the base is not there.
        """
        folder = Path(folder)
        if not (folder / BANK_FILE).is_file():
            raise UserError(f"{folder} is not a bank: it holds no {BANK_FILE}; `vla bank create` makes one.")
        content = load_json(folder / BANK_FILE)
        if content.get("version") != BANK_VERSION:
            raise UserError(
                f"{folder / BANK_FILE} has version {content.get('version')!r}, this release reads"
                f" {BANK_VERSION}."
            )
        try:
            entries = {str(entry["name"]): dict(entry["sha256"]) for entry in content["experts"]}
            place, hashes = str(content["base"]["path"]), dict(content["base"]["sha256"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / BANK_FILE} is malformed ({error!r}); make the bank again.") from None
        found = Path(base) if base else Path(os.path.normpath(folder.resolve() / place))
        if not (found / BASE_WEIGHTS_FILE).is_file():
            raise UserError(
                f"The bank {folder} stands on the base {found}, which is not there; move it back."
            )
        return cls(folder, found, hashes, entries)

    @property
    def names(self) -> tuple[str, ...]:
        """The experts, in the order in which they came."""
        return tuple(self.expert_hashes)

    @property
    def hash(self) -> str:
        """SHA-256 over the hashes of everything that decides how the bank acts."""
        content = {"base": self.base_hashes, "experts": list(self.expert_hashes.items())}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def expert_folder(self, name: str) -> Path:
        """Folder of the expert `name`; raises `UserError` if the bank does not hold it."""
        if name not in self.expert_hashes:
            raise UserError(
                f"The bank {self.folder} has no expert '{name}'.{nearest(name, self.names)} It has:"
                f" {', '.join(self.names) or 'none'}."
            )
        return self.folder / EXPERTS_FOLDER / name

    def experts(self) -> list[LoraExpert]:
        """Open all experts; their tensors are read when asked for."""
        return [LoraExpert.load(self.expert_folder(name)) for name in self.names]

    def verify(self) -> None:
        """Raise `UserError` if a file of the base or of an expert is not what was put there."""
        places = {self.base: self.base_hashes}
        places |= {self.expert_folder(name): hashes for name, hashes in self.expert_hashes.items()}
        for place, hashes in places.items():
            for file, expected in hashes.items():
                if not (place / file).is_file() or file_hash(place / file) != expected:
                    raise UserError(
                        f"{place / file} is not what the bank {self.folder} was made with; put it back, or"
                        " remove the expert and add it again."
                    )

    def add(self, folder: Path, instructions: Sequence[str] = ()) -> BankFolder:
        """Copy an expert's folder into the bank and return the bank with it.

        `instructions`, if any, replace those on the expert's card in the copy. Raises `UserError` if the name
        is taken, or the expert was trained on another base, does not fit it or speaks another interface.
        """
        expert = LoraExpert.load(folder)
        expert.require_base(self.base_hashes[BASE_WEIGHTS_FILE], self.base)
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", expert.name):
            raise UserError(f"The expert's name '{expert.name}' is no folder name; declare it again.")
        if expert.name in self.expert_hashes:
            raise UserError(f"The bank already has an expert '{expert.name}'; remove it first.")
        expert.require_fits(TensorFile(self.base / BASE_WEIGHTS_FILE).shapes)
        if expert.contract:
            require_same_interface(expert.contract, PolicyContract.load(self.base), expert.name)
        place = self.folder / EXPERTS_FOLDER / expert.name
        with whole_folder(place) as staging:
            for file in _EXPERT_FILES:
                if (Path(folder) / file).is_file():
                    shutil.copyfile(Path(folder) / file, staging / file)
            if instructions:
                save_card(staging, replace(expert.card, instructions=tuple(instructions)))
        hashes = {**self.expert_hashes, expert.name: _hashes(place, _EXPERT_FILES)}
        return replace(self, expert_hashes=hashes)._save()

    def remove(self, name: str) -> BankFolder:
        """Remove an expert and its folder and return the bank without it."""
        place = self.expert_folder(name)
        others = {other: hashes for other, hashes in self.expert_hashes.items() if other != name}
        remaining = replace(self, expert_hashes=others)._save()
        shutil.rmtree(place, ignore_errors=True)
        return remaining

    def _save(self) -> BankFolder:
        place = os.path.relpath(self.base.resolve(), self.folder.resolve())
        content: dict[str, Any] = {
            "version": BANK_VERSION,
            "base": {"path": place, "sha256": dict(self.base_hashes)},
            "experts": [{"name": name, "sha256": dict(h)} for name, h in self.expert_hashes.items()],
        }
        write_text(self.folder / BANK_FILE, json.dumps(content, indent=2) + "\n")
        return self


def require_same_interface(own: PolicyContract, base: PolicyContract, name: str) -> None:
    """Raise `UserError` unless an expert's contract differs from its base's in statistics alone.

    The rows of one batch have one shape, and one simulator or arm serves all experts.
    """
    mine, theirs = (asdict(replace(contract, statistics={})) for contract in (own, base))
    differing = sorted(key for key in mine if mine[key] != theirs[key])
    if differing:
        raise UserError(
            f"The expert '{name}' differs from its base in {', '.join(differing)} of its contract; experts of"
            " one bank or merge may differ in their normalisation statistics only."
        )


def _hashes(folder: Path, files: Sequence[str]) -> dict[str, str]:
    return {file: file_hash(folder / file) for file in files if (folder / file).is_file()}


@dataclass(frozen=True)
class BankCreateConfig:
    """Make a bank of unmerged LoRA experts on one base."""

    bank: Annotated[Path, tyro.conf.Positional]
    """Folder of the new bank."""
    base: Path
    """The base checkpoint that the experts were trained on; it stays where it is."""
    experts: tuple[Path, ...] = ()
    """Folders of experts, or of their training runs, to begin with; they are copied."""


@dataclass(frozen=True)
class BankAddConfig:
    """Add an expert to a bank."""

    bank: Annotated[Path, tyro.conf.Positional]
    """Folder of the bank."""
    expert: Annotated[Path, tyro.conf.Positional]
    """Folder of the expert, or of its training run; it is copied."""
    instructions: tuple[str, ...] = ()
    """The tasks it was trained on, word for word, if its card does not say."""


@dataclass(frozen=True)
class BankRemoveConfig:
    """Remove an expert from a bank."""

    bank: Annotated[Path, tyro.conf.Positional]
    """Folder of the bank."""
    name: Annotated[str, tyro.conf.Positional]
    """The expert's name."""


def bank_create(config: BankCreateConfig) -> None:
    """Run ``vla bank create``."""
    from vla.policy.checkpoint import resolve_checkpoint

    experts = [find_expert(path) or path for path in config.experts]
    _show(BankFolder.create(config.bank, resolve_checkpoint(config.base), experts))


def bank_add(config: BankAddConfig) -> None:
    """Run ``vla bank add``."""
    _show(BankFolder.open(config.bank).add(find_expert(config.expert) or config.expert, config.instructions))


def bank_remove(config: BankRemoveConfig) -> None:
    """Run ``vla bank remove``."""
    _show(BankFolder.open(config.bank).remove(config.name))


def _show(bank: BankFolder) -> None:
    print(f"{bank.folder}: {len(bank.names)} experts on {bank.base}")
    for expert in bank.experts():
        known = (
            f"{len(expert.card.instructions)} instructions" if expert.card.instructions else "no instruction"
        )
        print(f"  {expert.name}: {len(expert.modules)} LoRA layers, {known}")

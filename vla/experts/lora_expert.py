"""A skill on disk: a LoRA adapter in PEFT's folder format, and what it was trained on.

The folder is a plain PEFT adapter (``adapter_config.json``, ``adapter_model.safetensors``), so PEFT loads it
and what PEFT saved loads here. Parameters that were trained in full are PEFT's ``modules_to_save``.
Beside it lie ``expert.json`` (`ExpertCard`: which base, which head initialisation) and, if the expert drives
a robot, its ``contract.json`` with its own normalisation statistics.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vla.atomic import whole_folder, write_text
from vla.contract import CONTRACT_FILE, PolicyContract
from vla.errors import UserError, nearest
from vla.experts.low_rank import LowRank
from vla.experts.tensor_stream import TensorFile, file_hash
from vla.json_file import load_json
from vla.run_folder import find_newest

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
CARD_FILE = "expert.json"
CARD_VERSION = 1
BASE_WEIGHTS_FILE = "model.safetensors"

_PREFIX = "base_model.model."  # PEFT names tensors as seen from its wrapper
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
#: Settings that do not change what a saved adapter computes, or that are honoured below. Any other setting
#: that is switched on (DoRA, biases, embeddings, whatever comes next) changes the algebra and is refused.
_HONOURED = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
#: Other initialisations (PiSSA, OLoRA, CorDA, LoftQ, ...) also change the base, which would no longer fit.
_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class ExpertCard:
    """What an expert declares: `base` is the SHA-256 of the base's ``model.safetensors``.

    `head_seed` is the seed from which the expert started a head anew, or None if it kept the base's:
    averaging what was trained in full is only meaningful between experts that started alike.
    `instructions` are the tasks that it was trained on, word for word; routers and evaluations read them.
    `base_place` leads from the expert's folder to the base's, so that both can be moved together.
    """

    name: str
    base: str
    head_seed: int | None = None
    version: int = CARD_VERSION
    instructions: tuple[str, ...] = ()
    base_place: str | None = None


@dataclass(frozen=True)
class LoraExpert:
    """One expert. `tensors` maps PEFT's names, without its prefix, to tensors, and may be a lazy file.

    `config` is the content of ``adapter_config.json``. Raises `UserError` for an adapter that is not plain
    LoRA on linear layers, or that contradicts its config.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    card: ExpertCard | None = None
    contract: PolicyContract | None = None
    source: str = "the expert"
    _factors: dict[str, tuple[str, str]] = field(init=False, repr=False)

    def __post_init__(self):
        _require_plain_lora(self.config, self.source)
        object.__setattr__(self, "_factors", _pair_factors(self.tensors, self.source))
        for module in self._factors:
            self._require_shapes(module)

    @property
    def name(self) -> str:
        """Name on the card, or where the expert comes from."""
        return self.card.name if self.card else self.source

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Linear layers with LoRA factors, sorted."""
        return tuple(sorted(self._factors))

    @cached_property
    def full_tensors(self) -> tuple[str, ...]:
        """Parameters that were trained in full (``modules_to_save``), sorted."""
        factors = {name for pair in self._factors.values() for name in pair}
        return tuple(sorted(name for name in self.tensors if name not in factors))

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of all tensors; of a file's, from its header."""
        if isinstance(self.tensors, _WithoutPrefix):
            return self.tensors.shapes
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def rank(self, module: str) -> int:
        """LoRA rank of `module`: ``rank_pattern`` or ``r``."""
        return int(_lookup(self.config.get("rank_pattern"), module, self.config["r"], self.source))

    def scale(self, module: str) -> float:
        """``α/r``, or ``α/√r`` with rsLoRA, with the layer's own α and r where patterns name it."""
        alpha = _lookup(self.config.get("alpha_pattern"), module, self.config["lora_alpha"], self.source)
        rank = self.rank(module)
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def shape(self, module: str) -> tuple[int, int]:
        """(m, n) of the layer's weight matrix."""
        a, b = self._factors[module]
        return self._shapes[b][0], self._shapes[a][1]

    def update(self, module: str) -> LowRank:
        """The layer's task vector ``τ = scale · B A`` in float32; raises `UserError` if it is not finite."""
        a, b = (self.tensors[name].to(torch.float32) for name in self._factors[module])
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UserError(f"{self.source} holds a value that is not finite in '{module}'; train it again.")
        return LowRank(b * self.scale(module), a)

    def require_base(self, base: str, where: Path) -> None:
        """Raise `UserError` unless the expert declares `base`, the hash of the weights in `where`."""
        if self.card is None:
            raise UserError(
                f"{self.source} does not say which base it was trained on ({CARD_FILE} is missing); if you"
                " know that it is this one, declare it with `vla.experts.lora_expert.declare`."
            )
        if self.card.base != base:
            raise UserError(
                f"The expert '{self.card.name}' ({self.source}) was trained on base {self.card.base[:12]}…,"
                f" but {where} is {base[:12]}…; use that base, or train the expert again on this one."
            )

    def require_fits(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise `UserError` unless a base whose tensors have `shapes` holds all that is changed here."""
        changed = {f"{module}.weight": self.shape(module) for module in self.modules}
        changed |= {name: self._shapes[name] for name in self.full_tensors}
        for name, shape in changed.items():
            if name not in shapes:
                raise UserError(
                    f"The expert '{self.name}' changes '{name}', which the base does not have."
                    f"{nearest(name, shapes)}"
                )
            if tuple(shapes[name]) != shape:
                raise UserError(
                    f"The expert '{self.name}' has '{name}' of shape {shape}, the base"
                    f" {tuple(shapes[name])}; they are of different models."
                )

    def save(self, folder: Path) -> Path:
        """Write the folder whole or not at all, factors in float32, and return its path."""
        content = {
            _PREFIX + name: (value.float() if "lora_" in name else value).contiguous()
            for name, value in self.tensors.items()
        }
        with whole_folder(folder) as staging:
            save_file(content, staging / TENSORS_FILE, metadata={"format": "pt"})
            write_text(staging / CONFIG_FILE, json.dumps(dict(self.config), indent=2, sort_keys=True) + "\n")
            if self.card:
                save_card(staging, self.card)
            if self.contract:
                self.contract.save(staging)
        return Path(folder)

    @classmethod
    def load(cls, folder: Path) -> LoraExpert:
        """Open an expert's folder, or any PEFT LoRA folder; tensors are read when asked for.

        Raises `UserError` for anything missing, damaged or not plain LoRA.
        """
        folder = Path(folder)
        if not (folder / CONFIG_FILE).is_file():
            raise UserError(f"{folder} is not an expert: it holds no {CONFIG_FILE}.")
        return cls(
            config=load_json(folder / CONFIG_FILE),
            tensors=_WithoutPrefix(TensorFile(folder / TENSORS_FILE)),
            card=load_card(folder),
            contract=PolicyContract.load(folder) if (folder / CONTRACT_FILE).exists() else None,
            source=str(folder),
        )

    def _require_shapes(self, module: str) -> None:
        a, b = (self._shapes[name] for name in self._factors[module])
        rank = self.rank(module)
        if len(a) != 2 or len(b) != 2:
            raise UserError(
                f"{self.source} adapts '{module}', which is not a linear layer (its factors have shapes {a}"
                f" and {b}); retrain without it in target_modules."
            )
        if a[0] != rank or b[1] != rank:
            raise UserError(
                f"{self.source} contradicts itself: its config gives '{module}' rank {rank}, its factors have"
                f" shapes {a} and {b}; copy it again."
            )


def make_config(
    ranks: Mapping[str, int], alpha: float, *, rslora: bool = False, full_modules: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The ``adapter_config.json`` of an adapter with one rank per module and α shared by all.

    `full_modules` are trained in full. Modules are named in full; patterns are anchored, because PEFT
    otherwise takes the first pattern that matches the end of a name.
    """
    if not ranks:
        raise UserError("An expert needs at least one linear layer with LoRA factors.")
    common = max(ranks.values(), key=list(ranks.values()).count)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "r": common,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "rank_pattern": {f"^{re.escape(m)}": rank for m, rank in ranks.items() if rank != common},
        "alpha_pattern": {},
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(full_modules) or None,
    }


def find_expert(path: Path) -> Path | None:
    """Return the expert's folder that `path` means (itself, a training run, a checkpoint of it), or None."""
    return find_newest(path, CONFIG_FILE)


def base_hash(folder: Path) -> str:
    """SHA-256 of the weights of the base checkpoint in `folder`; raises `UserError` if it has none."""
    path = Path(folder) / BASE_WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a base checkpoint: it holds no {BASE_WEIGHTS_FILE}.")
    return file_hash(path)


def declare(
    folder: Path, name: str, base: Path, head_seed: int | None = None, instructions: Sequence[str] = ()
) -> ExpertCard:
    """Write the card of an adapter trained elsewhere: it fits the base checkpoint in the folder `base`."""
    if not (Path(folder) / CONFIG_FILE).is_file():
        raise UserError(f"{folder} is not an expert: it holds no {CONFIG_FILE}.")
    card = ExpertCard(name, base_hash(base), head_seed, instructions=tuple(instructions))
    save_card(Path(folder), card)
    return card


class _WithoutPrefix(Mapping[str, Tensor]):
    """PEFT's tensors under the names of the model that it wrapped."""

    def __init__(self, file: TensorFile):
        foreign = [name for name in file if not name.startswith(_PREFIX)]
        if foreign:
            raise UserError(
                f"{file.path} holds '{foreign[0]}', a name that PEFT does not write; copy it again."
            )
        self._file = file

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, from the header alone."""
        return {name.removeprefix(_PREFIX): shape for name, shape in self._file.shapes.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._file[_PREFIX + name]

    def __iter__(self):
        return (name.removeprefix(_PREFIX) for name in self._file)

    def __len__(self) -> int:
        return len(self._file)


def _require_plain_lora(config: Mapping[str, Any], source: str) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{source} is a {config.get('peft_type')} adapter; only LORA can be merged.")
    for key in ("r", "lora_alpha"):
        if type(config.get(key)) not in (int, float) or config[key] <= 0:
            raise UserError(
                f"{source} has {key} = {config.get(key)!r} in its config; a positive number is needed."
            )
    active = sorted(key for key, value in config.items() if key not in _HONOURED and value)
    if config.get("bias", "none") != "none":
        active.append("bias")
    if config.get("init_lora_weights", True) not in _INITIALISATIONS:
        active.append(f"init_lora_weights={config['init_lora_weights']}")
    if active:
        raise UserError(
            f"{source} is not plain LoRA on linear layers: its config switches on {', '.join(active)}; train"
            " it without, or convert it to plain LoRA with PEFT."
        )


def _pair_factors(tensors: Mapping[str, Tensor], source: str) -> dict[str, tuple[str, str]]:
    """Map each module to the names of its A and B."""
    sides: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = _FACTOR.fullmatch(name)
        if match:
            sides.setdefault(match["module"], {})[match["side"]] = name
        elif ".lora_" in name:
            raise UserError(f"{source} holds '{name}', which is not a LoRA factor of a linear layer.")
    if not sides:
        raise UserError(f"{source} holds no LoRA factors; copy it again in full.")
    for module, pair in sides.items():
        if len(pair) != 2:
            raise UserError(f"{source} holds only one of the two factors of '{module}'; copy it again.")
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _lookup(pattern: Mapping[str, float] | None, module: str, default: float, source: str) -> float:
    """PEFT's rule: the first key that, as a regular expression, matches the end of the module's name."""
    for key, value in (pattern or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise UserError(f"{source} has the malformed pattern '{key}' in its config ({error}).") from None
    return default


def save_card(folder: Path, card: ExpertCard) -> Path:
    """Write ``expert.json`` into `folder` atomically and return its path."""
    return write_text(Path(folder) / CARD_FILE, json.dumps(asdict(card), indent=2) + "\n")


def load_card(folder: Path) -> ExpertCard | None:
    """Read ``expert.json`` from `folder`, None if there is none; raises `UserError` if it is malformed."""
    path = Path(folder) / CARD_FILE
    if not path.exists():
        return None
    content = load_json(path)
    if content.get("version") != CARD_VERSION:
        raise UserError(f"{path} has version {content.get('version')!r}, this release reads {CARD_VERSION}.")
    for key, absent in (("instructions", []), ("base_place", None)):  # cards were first written without
        content.setdefault(key, absent)
    kinds = {"name": str, "base": str, "head_seed": int | None, "version": int, "instructions": list}
    kinds |= {"base_place": str | None}
    wrong = sorted(key for key in kinds.keys() | content.keys() if not _fits(content, key, kinds))
    if not wrong and not all(isinstance(text, str) for text in content["instructions"]):
        wrong = ["instructions"]
    if wrong:
        raise UserError(
            f"{path} has missing, unknown or malformed entries: {', '.join(wrong)}; declare it again."
        )
    return ExpertCard(**content | {"instructions": tuple(content["instructions"])})


def _fits(content: Mapping[str, Any], key: str, kinds: Mapping[str, Any]) -> bool:
    return key in content and key in kinds and isinstance(content[key], kinds[key])

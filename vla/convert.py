"""`vla convert`: a released OpenVLA, OpenVLA-OFT or CogVLA checkpoint becomes one of this stack.

The folder holds the released weights as safetensors: the model's own files, and what the releases keep
beside them (``vision_backbone*``, ``proprio_projector*``, ``action_head*``), whose tensors replace the
model's. Files that need unpickling are not read. The interface is LIBERO's, for which these checkpoints were
trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vla.contract import ACTION_KEY, STATE_KEY, Interface
from vla.errors import UserError, nearest
from vla.json_file import load_json
from vla.policy.checkpoint import save_checkpoint
from vla.policy.configuration_cogmerge import CogMergeConfig
from vla.policy.instruction import TOKENIZER_FILE
from vla.policy.manifest import describe_build, make_contract
from vla.policy.modeling_cogmerge import CogMergePolicy
from vla.policy.processor_cogmerge import make_cogmerge_pre_post_processors
from vla.policy.released_checkpoints import convert, describe, normalised_name, starts_anew
from vla.sim import sim_interface

#: Saved beside the model by the releases; the file's name is the first part of its tensors' names.
BESIDE = ("vision_backbone", "proprio_projector", "action_head")
STATISTICS_FILE = "dataset_statistics.json"
#: Un-normalises g in {0, 1}, 1 for open, to LIBERO's gripper command 1 - 2 g, which closes at +1.
GRIPPER_QUANTILES = (3.0, -1.0)


@dataclass(frozen=True)
class ConvertConfig:
    """Write SOURCE, a folder of released safetensors, as a checkpoint folder OUT.

    The released evaluation crops the centre of its images (0.95 of a side) after training on random crops;
    the converted checkpoint sees whole images.
    """

    source: tyro.conf.Positional[Path]
    """Folder with the released weights, config.json, tokenizer.json and dataset_statistics.json."""
    out: tyro.conf.Positional[Path]
    """Checkpoint folder to write."""
    statistics: str | None = None
    """Dataset whose statistics normalise, such as libero_spatial_no_noops; needed if there are several."""
    chunk_size: int = 8
    """Actions per chunk that the checkpoint was trained for; its tensors do not tell."""


def run_convert(config: ConvertConfig) -> Path:
    """Convert and return the checkpoint's folder; raise `UserError` for anything that is not as released."""
    if config.out.exists():
        raise UserError(f"{config.out} exists already; choose another folder.")
    tensors = ReleasedFolder(config.source)
    told = load_json(config.source / "config.json")
    interface = sim_interface()
    statistics = released_statistics(config.source, told, config.statistics)
    policy_config = policy_configuration(tensors, told, interface, config)
    with torch.device("meta"):
        policy = CogMergePolicy(policy_config, pretrained_backbones=False)
    state = {f"model.{name}": value for name, value in convert(tensors, policy.model).items()}
    preprocessor, postprocessor = make_cogmerge_pre_post_processors(
        policy_config,
        {key: {name: torch.tensor(x) for name, x in stats.items()} for key, stats in statistics.items()},
    )
    manifest = describe_build(policy, converted_from=config.source.name, trained=not starts_anew(tensors))
    contract = make_contract(policy_config, interface, statistics)
    save_checkpoint(config.out, policy, preprocessor, postprocessor, contract, manifest, state)
    print(f"Wrote {config.out}: {sum(value.numel() for value in state.values()):,} parameters.")
    return config.out


class ReleasedFolder(Mapping[str, Tensor]):
    """The tensors of a released checkpoint by normalised name, read when asked for."""

    def __init__(self, folder: Path):
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise UserError(
                f"{folder} has no .safetensors file; convert pickled weights (.pt, .bin) to safetensors with"
                " the code that wrote them, this program never unpickles."
            )
        self._places: dict[str, tuple[Any, str]] = {}
        for path in sorted(files, key=lambda path: _component(path) is not None):
            try:
                opened = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise UserError(f"{path} is truncated or not a safetensors file ({error}).") from None
            component = _component(path)
            for name in opened.keys():  # noqa: SIM118 - not a dict
                bare = name.removeprefix("module.")
                ours = normalised_name(f"{component}.{bare}" if component else bare)
                self._places[ours] = (opened, name)

    def __getitem__(self, name: str) -> Tensor:
        opened, there = self._places[name]
        return opened.get_tensor(there)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def policy_configuration(
    tensors: Mapping[str, Tensor], told: Mapping[str, Any], interface: Interface, config: ConvertConfig
) -> CogMergeConfig:
    """The converted policy's configuration for LIBERO's `interface`; `told` is the source's config.json."""
    if not (config.source / TOKENIZER_FILE).is_file():
        raise UserError(f"{config.source} has no {TOKENIZER_FILE}; copy it from the released checkpoint.")
    quantiles, identity = NormalizationMode.QUANTILES, NormalizationMode.IDENTITY
    return CogMergeConfig(
        preset="cogvla-7b",
        device="cpu",
        push_to_hub=False,
        input_features={
            camera.key: PolicyFeature(FeatureType.VISUAL, (3, camera.height, camera.width))
            for camera in interface.cameras
        }
        | {STATE_KEY: PolicyFeature(FeatureType.STATE, (interface.state.dim,))},
        output_features={ACTION_KEY: PolicyFeature(FeatureType.ACTION, (interface.action.dim,))},
        normalization_mapping={"VISUAL": identity, "STATE": quantiles, "ACTION": quantiles},
        tokenizer=str(config.source),
        chunk_size=config.chunk_size,
        n_action_steps=config.chunk_size,
        head_seed=0,
        action_space=interface.action_space,
        **describe(tensors, told.get("text_config", {})),
    )


def released_statistics(
    folder: Path, told: Mapping[str, Any], dataset: str | None
) -> dict[str, dict[str, list[float]]]:
    """Quantiles with which LeRobot's rule ``2 (x - q01) / (q99 - q01) - 1`` is the released one.

    From ``dataset_statistics.json``, or ``norm_stats`` in `told`. An entry that never changes maps to 0, one
    that the release does not normalise is the gripper (`GRIPPER_QUANTILES`).
    """
    path = folder / STATISTICS_FILE
    known = load_json(path) if path.is_file() else told.get("norm_stats", {})
    if dataset is None and len(known) == 1:
        dataset = next(iter(known))
    if dataset not in known:
        raise UserError(
            f"Say with --statistics whose statistics normalise.{nearest(dataset or '', known)}"
            f" {folder} has: {', '.join(sorted(known)) or 'none'}."
        )
    found = known[dataset]
    return {
        STATE_KEY: _quantiles(found, "proprio", dataset),
        ACTION_KEY: _quantiles(found, "action", dataset),
    }


def _quantiles(found: Mapping[str, Any], part: str, dataset: str) -> dict[str, list[float]]:
    numbers = found.get(part, {})
    if "q01" not in numbers or "q99" not in numbers:
        raise UserError(f"The statistics of {dataset} lack the quantiles q01 and q99 of '{part}'.")
    mask = numbers.get("mask", [True] * len(numbers["q01"]))
    low, high = [], []
    for q01, q99, normalised in zip(numbers["q01"], numbers["q99"], mask, strict=True):
        if not normalised:
            q01, q99 = GRIPPER_QUANTILES
        elif q01 == q99:
            q01, q99 = q01 - 1, q99 + 1
        low.append(float(q01))
        high.append(float(q99))
    return {"q01": low, "q99": high}


def _component(path: Path) -> str | None:
    return next((name for name in BESIDE if path.name.startswith(name)), None)

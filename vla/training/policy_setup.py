"""The policy that a run starts from: new at the preset's sizes, a checkpoint's, or a base with an adapter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import PRETRAINED_MODEL_DIR

from vla.contract import JOINT_POSITION, OSC_POSE_DELTA, Interface
from vla.errors import UserError, nearest
from vla.experts.expert_policy import with_statistics
from vla.experts.lora_expert import ExpertCard, LoraExpert, base_hash
from vla.json_file import load_json
from vla.policy.checkpoint import LoadedPolicy, checkpoint_hash, load_checkpoint
from vla.policy.configuration_cogmerge import CogMergeConfig
from vla.policy.head import PARTS, initialise_head
from vla.policy.manifest import MANIFEST_FILE, make_contract
from vla.policy.modeling_cogmerge import CogMergePolicy
from vla.policy.processor_cogmerge import make_cogmerge_pre_post_processors
from vla.training.config import TrainConfig
from vla.training.dataset import Demonstrations, joint_statistics
from vla.training.keyframe import HandPlace
from vla.training.lora import Adapter, adapt

_ACTION_SPACES = (OSC_POSE_DELTA, JOINT_POSITION)


@dataclass
class Start:
    """What a run trains and how it is saved.

    `adapter` is there if low-rank factors are trained; `card` too if they are saved as an expert on the base
    in the folder `base`, whose processors and contract `loaded` has, possibly with other statistics.
    """

    loaded: LoadedPolicy
    adapter: Adapter | None = None
    card: ExpertCard | None = None
    base: Path | None = None

    @property
    def policy(self) -> CogMergePolicy:
        """The policy."""
        return self.loaded.policy


def start_policy(
    config: TrainConfig, datasets: Sequence[Demonstrations], device: str, resume_from: Path | None = None
) -> Start:
    """Return the policy with its processors and contract, on `device`, before the first step of this process.

    From a checkpoint (`resume_from`, else ``config.init_from``) weights, sizes and normalisation are kept and
    its contract must fit the dataset. Low-rank factors start anew on what the run started from, also on
    resuming: `Trainer.restore` brings their values. Raises `UserError` when the checkpoint does not fit the
    dataset or changed since the run began, or when the dataset does not say what its actions mean.
    """
    interface = datasets[0].interface
    _require_action_space(interface, datasets[0])
    if config.init_from is not None and config.policy:
        raise UserError("--policy cannot change the sizes of a checkpoint; leave it out with --init-from.")
    if config.expert is not None:
        return _start_expert(config, datasets, device, resume_from)
    if config.uses_lora:
        return _start_lora(config, datasets, device, resume_from)
    checkpoint = resume_from or config.init_from
    if checkpoint is not None:
        return Start(_load(checkpoint, datasets[0], device))
    return Start(_new(config, datasets, device))


def _start_expert(
    config: TrainConfig, datasets: Sequence[Demonstrations], device: str, resume_from: Path | None
) -> Start:
    loaded = _load(config.base, datasets[0], device)
    base = loaded.path.resolve()  # `last` is a link that training moves on
    if config.statistics == "own":
        loaded = with_statistics(loaded, joint_statistics(datasets))
    head = _new_head(loaded.policy, config.head_seed) if config.head_seed is not None else []
    instructions = sorted({text for dataset in datasets for text in dataset.chosen_instructions})
    card = ExpertCard(
        config.expert,
        base_hash(base),
        head_seed=loaded.policy.config.head_seed,
        instructions=tuple(instructions),
    )
    if resume_from is not None:
        LoraExpert.load(resume_from / PRETRAINED_MODEL_DIR).require_base(card.base, base)
    torch.manual_seed(config.seed)
    return Start(loaded, adapt(loaded.policy, config.lora, also_full=head), card, base)


def _new_head(policy: CogMergePolicy, seed: int) -> list[str]:
    """Start the head anew; all of it is then to be trained in full, and its parameters are returned."""
    initialise_head(policy, seed)
    parts = tuple(f"model.{part}" for part in PARTS)
    return [name for name, _ in policy.named_parameters() if name in parts or name.startswith(parts)]


def _start_lora(
    config: TrainConfig, datasets: Sequence[Demonstrations], device: str, resume_from: Path | None
) -> Start:
    """Factors on a pretrained policy, saved folded into its weights."""
    if config.init_from is None:
        return _start_lora_on_backbones(config, datasets, device)
    loaded = _load(config.init_from, datasets[0], device)
    if resume_from is not None:
        before = load_json(resume_from / PRETRAINED_MODEL_DIR / MANIFEST_FILE)["init_from_hash"]
        if checkpoint_hash(config.init_from) != before:
            raise UserError(
                f"The checkpoint {config.init_from} has changed since the run in {config.out} began, and its"
                " factors fit the old one only; put it back, or start a new run."
            )
    torch.manual_seed(config.seed)
    return Start(loaded, adapt(loaded.policy, config.lora))


def _start_lora_on_backbones(config: TrainConfig, datasets: Sequence[Demonstrations], device: str) -> Start:
    """A new policy around pretrained backbones: they get factors, everything else is trained in full."""
    loaded = _new(config, datasets, device)
    names = [name for name, _ in loaded.policy.named_parameters()]
    fresh = [name for name in names if not _is_pretrained(loaded.policy.config, name)]
    if len(fresh) == len(names):
        raise UserError(
            "--lora.rank adapts pretrained weights, and this policy has none: name a trained one with"
            " --init-from CHECKPOINT, or pretrained backbones with --policy decoder_backbone=FOLDER."
        )
    torch.manual_seed(config.seed)
    return Start(loaded, adapt(loaded.policy, config.lora, also_full=fresh))


def _is_pretrained(config: CogMergeConfig, name: str) -> bool:
    """Whether a parameter of a new policy came with a backbone's weights."""
    if name.startswith("model.decoder.backbone."):
        return bool(config.decoder_backbone)
    inside = ".embeddings." in name or ".layer." in name  # of a `vla.policy.pretrained_encoder` block
    return bool(config.vision_backbones) and name.startswith("model.vision.encoders.") and inside


def _load(checkpoint: Path, dataset: Demonstrations, device: str) -> LoadedPolicy:
    loaded = load_checkpoint(checkpoint, device)
    loaded.contract.require(dataset.interface, source=f"the dataset at {dataset.root}")
    return loaded


def _new(config: TrainConfig, datasets: Sequence[Demonstrations], device: str) -> LoadedPolicy:
    interface = datasets[0].interface
    policy_config = new_policy_config(config, interface, device)
    torch.manual_seed(config.seed)
    policy = CogMergePolicy(policy_config).to(device)
    statistics = joint_statistics(datasets)
    policy.contract = make_contract(policy_config, interface, statistics)
    preprocessor, postprocessor = make_cogmerge_pre_post_processors(policy_config, statistics)
    return LoadedPolicy(policy, preprocessor, postprocessor, policy.contract, {}, config.out)


def _require_action_space(interface: Interface, dataset: Demonstrations) -> None:
    if interface.action_space is None:
        raise UserError(
            f"The dataset at {dataset.root} does not say what its actions mean; say it with --action-space "
            f"(known: {', '.join(_ACTION_SPACES)})."
        )
    if interface.action_space not in _ACTION_SPACES:
        raise UserError(
            f"Unknown action space '{interface.action_space}'."
            f"{nearest(interface.action_space, _ACTION_SPACES)} Known: {', '.join(_ACTION_SPACES)}."
        )


def new_policy_config(config: TrainConfig, interface: Interface, device: str) -> CogMergeConfig:
    """Configuration of a new policy: the preset, what ``config.policy`` changes, the dataset's features."""
    inputs = {
        camera.key: PolicyFeature(FeatureType.VISUAL, (3, camera.height, camera.width))
        for camera in interface.cameras
    }
    if interface.state is not None:
        inputs[interface.state.key] = PolicyFeature(FeatureType.STATE, (interface.state.dim,))
    place = HandPlace.of(interface)
    keyframe = {} if place is None else {"keyframe_dim": place.dim, "keyframe_unit": place.unit}
    return CogMergeConfig(
        preset=config.preset,
        input_features=inputs,
        output_features={interface.action.key: PolicyFeature(FeatureType.ACTION, (interface.action.dim,))},
        device=device,
        action_space=interface.action_space,
        push_to_hub=False,
        **keyframe | _overrides(config.policy),
    )


def _overrides(settings: Sequence[str]) -> Mapping[str, Any]:
    known = {field.name for field in dataclasses.fields(CogMergeConfig)}
    values = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or name not in known:
            raise UserError(
                f"--policy {setting} is not a setting of the policy (NAME=VALUE).{nearest(name, known)}"
            )
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values

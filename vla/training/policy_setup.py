"""The policy that a run starts from: new at the preset's sizes, or a checkpoint's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature

from vla.contract import JOINT_POSITION, OSC_POSE_DELTA, Interface
from vla.errors import UserError, nearest
from vla.policy.checkpoint import LoadedPolicy, load_checkpoint
from vla.policy.configuration_cogmerge import CogMergeConfig
from vla.policy.manifest import make_contract
from vla.policy.modeling_cogmerge import CogMergePolicy
from vla.policy.processor_cogmerge import make_cogmerge_pre_post_processors
from vla.training.config import TrainConfig
from vla.training.dataset import Demonstrations, joint_statistics

_ACTION_SPACES = (OSC_POSE_DELTA, JOINT_POSITION)


def start_policy(
    config: TrainConfig, datasets: Sequence[Demonstrations], device: str, resume_from: Path | None = None
) -> LoadedPolicy:
    """Return the policy with its processors and contract, on `device`, before the first step of this process.

    From a checkpoint (`resume_from`, else ``config.init_from``) weights, sizes and normalisation are kept and
    its contract must fit the dataset. Raises `UserError` when it does not, or when the dataset does not say
    what its actions mean.
    """
    interface = datasets[0].interface
    _require_action_space(interface, datasets[0])
    if config.init_from is not None and config.policy:
        raise UserError("--policy cannot change the sizes of a checkpoint; leave it out with --init-from.")
    checkpoint = resume_from or config.init_from
    if checkpoint is not None:
        loaded = load_checkpoint(checkpoint, device)
        loaded.contract.require(interface, source=f"the dataset at {datasets[0].root}")
        return loaded
    statistics = joint_statistics(datasets)
    policy_config = new_policy_config(config, interface, device)
    torch.manual_seed(config.seed)
    policy = CogMergePolicy(policy_config).to(device)
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
    return CogMergeConfig(
        preset=config.preset,
        input_features=inputs,
        output_features={interface.action.key: PolicyFeature(FeatureType.ACTION, (interface.action.dim,))},
        device=device,
        action_space=interface.action_space,
        push_to_hub=False,
        **_overrides(config.policy),
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

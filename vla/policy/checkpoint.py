"""Saving, strict loading and running of checkpoints.

A checkpoint is LeRobot's ``pretrained_model`` folder (config, weights, processors) plus ``contract.json``
and ``manifest.json``. Loading refuses, with a sentence, whatever LeRobot would pass silently: a missing
statistic, another camera, another state size, a missing or unknown tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from draccus.utils import DraccusException
from lerobot.configs import PreTrainedConfig
from lerobot.policies import make_pre_post_processors
from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline, UnnormalizerProcessorStep
from safetensors import SafetensorError

from vla.atomic import whole_folder
from vla.contract import ACTION_KEY, CONTRACT_FILE, IMAGE_PREFIX, STATE_KEY, ContractError, PolicyContract
from vla.errors import UserError, nearest
from vla.json_file import load_json
from vla.policy.configuration_cogmerge import CogMergeConfig
from vla.policy.manifest import MANIFEST_FILE, save_manifest
from vla.policy.modeling_cogmerge import CogMergePolicy
from vla.policy.processor_cogmerge import require_statistics
from vla.policy.routing_report import RoutingReport, make_report
from vla.run_folder import find_newest

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PREPROCESSOR_FILE = "policy_preprocessor.json"
POSTPROCESSOR_FILE = "policy_postprocessor.json"
REQUIRED_FILES = (
    CONFIG_FILE, WEIGHTS_FILE, PREPROCESSOR_FILE, POSTPROCESSOR_FILE, CONTRACT_FILE, MANIFEST_FILE
)  # fmt: skip


@dataclass
class LoadedPolicy:
    """A checkpoint ready to act. `act` keeps no state: the same observation gives the same chunk."""

    policy: CogMergePolicy
    preprocessor: PolicyProcessorPipeline
    postprocessor: PolicyProcessorPipeline
    contract: PolicyContract
    manifest: dict[str, Any]
    path: Path

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, instruction: str) -> np.ndarray:
        """Predict one chunk, (K, D) float32, in the units of the dataset's actions.

        `images` maps each camera (``image`` or ``observation.images.image``) to (H, W, 3) uint8 at the
        contract's resolution; `state` has the contract's entries. Raises `ContractError` if they do not fit.
        """
        batch = self.preprocessor(self.batch(images, state, instruction))
        return self.finish(self.policy.predict_action_chunk(batch))

    @torch.no_grad()
    def act_with_report(
        self, images: Mapping[str, np.ndarray], state: np.ndarray, instruction: str
    ) -> tuple[np.ndarray, RoutingReport]:
        """Like `act`, and say what the routers did with this observation."""
        batch = self.preprocessor(self.batch(images, state, instruction))
        self.policy.eval()
        trace: dict[str, Any] = {}
        actions = self.finish(self.policy.predict(batch, trace).actions)
        return actions, make_report(self.policy.config, trace)

    def finish(self, chunk: torch.Tensor) -> np.ndarray:
        """Turn a predicted chunk (1, K, D), normalised, into actions (K, D) in the dataset's units."""
        return self.postprocessor(chunk)[0].float().numpy()

    def batch(self, images: Mapping[str, np.ndarray], state: np.ndarray, instruction: str) -> dict[str, Any]:
        """Check one observation and make it a batch of one, before preprocessing; raises as `act` does."""
        batch: dict[str, Any] = {"task": [instruction]}
        for camera in self.contract.interface.cameras:
            image = images.get(camera.key, images.get(camera.key.removeprefix(IMAGE_PREFIX)))
            if image is None:
                raise ContractError(
                    f"The observation lacks camera '{camera.key}'"
                    f" (it has: {', '.join(sorted(images)) or 'none'})."
                )
            if image.shape != (camera.height, camera.width, 3) or image.dtype != np.uint8:
                raise ContractError(
                    f"Camera '{camera.key}' gave {image.dtype} {image.shape}, the policy expects uint8"
                    f" {(camera.height, camera.width, 3)}."
                )
            batch[camera.key] = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
        need = self.contract.interface.state
        if need is not None:
            state = np.asarray(state, dtype=np.float32)
            if state.shape != (need.dim,):
                raise ContractError(
                    f"The state has shape {state.shape}, the policy expects {need.dim} entries"
                    f" ({', '.join(need.names)})."
                )
            batch[STATE_KEY] = torch.from_numpy(state)[None]
        return batch


def save_checkpoint(
    folder: Path,
    policy: CogMergePolicy,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    contract: PolicyContract,
    manifest: dict[str, Any],
    state: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write a checkpoint folder and return its path; an older one of that name is replaced.

    `state` are the weights to write if not the policy's present ones. The folder appears complete or not at
    all: it is written beside its final place and renamed.
    """
    folder = Path(folder)
    with whole_folder(folder) as staging:
        policy.save_pretrained(staging, state_dict=state)
        preprocessor.save_pretrained(staging)
        postprocessor.save_pretrained(staging)
        contract.save(staging)
        save_manifest(staging, manifest)
    return folder


def load_checkpoint(path: Path, device: str = "cpu") -> LoadedPolicy:
    """Load a checkpoint strictly onto `device`.

    `path` is a ``pretrained_model`` folder, a numbered checkpoint, ``checkpoints/last`` or a run's output
    folder. Raises `UserError` (one sentence) for anything missing, foreign, altered or inconsistent.
    """
    folder = resolve_checkpoint(path)
    config = _load_config(folder, device)
    contract = PolicyContract.load(folder)
    _require_same_interface(config, contract, folder)
    policy = CogMergePolicy.from_pretrained(folder, config=config)
    policy.contract = contract
    preprocessor, postprocessor = _load_processors(folder, config, device)
    _require_same_statistics(preprocessor, postprocessor, config, contract, folder)
    manifest = load_json(folder / MANIFEST_FILE)
    return LoadedPolicy(policy, preprocessor, postprocessor, contract, manifest, folder)


def resolve_checkpoint(path: Path) -> Path:
    """Return the ``pretrained_model`` folder that `path` means; raise `UserError` if there is none."""
    path = Path(path)
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"The checkpoint {path} does not exist.{nearest(path.name, siblings)}")
    folder = find_newest(path, CONFIG_FILE)
    if folder is None:
        raise UserError(
            f"{path} is not a checkpoint: neither it nor its 'pretrained_model' or 'checkpoints/last' holds a"
            f" {CONFIG_FILE}."
        )
    return folder


def checkpoint_hash(path: Path) -> str:
    """SHA-256 over weights, config and contract of the checkpoint at `path`; names it in every record."""
    folder = resolve_checkpoint(path)
    digest = hashlib.sha256()
    for name in (WEIGHTS_FILE, CONFIG_FILE, CONTRACT_FILE):
        if not (folder / name).is_file():
            raise UserError(f"The checkpoint {folder} lacks {name}; copy it again.")
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _load_config(folder: Path, device: str) -> CogMergeConfig:
    absent = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    kind = load_json(folder / CONFIG_FILE).get("type")
    if kind != "cogmerge":
        raise UserError(f"{folder} holds a policy of type {kind!r}, not a CogMerge checkpoint.")
    if absent:
        raise UserError(f"The checkpoint {folder} lacks {', '.join(absent)}; copy it again in full.")
    try:
        return PreTrainedConfig.from_pretrained(folder, cli_overrides=[f"--device={device}"])
    except (DraccusException, ValueError, TypeError) as error:
        raise UserError(
            f"{folder / CONFIG_FILE} was not written by this release ({' '.join(str(error).split())})."
        ) from None


def _load_processors(folder: Path, config: CogMergeConfig, device: str):
    try:
        return make_pre_post_processors(
            config,
            pretrained_path=str(folder),
            preprocessor_overrides={
                "device_processor": {"device": device},
                "normalizer_processor": {"device": device},
            },
        )
    except (SafetensorError, FileNotFoundError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"The processors in {folder} cannot be loaded ({' '.join(str(error).split())}); copy the"
            " checkpoint again."
        ) from None


def _require_same_interface(config: CogMergeConfig, contract: PolicyContract, folder: Path) -> None:
    promised = sorted(camera.key for camera in contract.interface.cameras)
    if promised != config.camera_keys:
        raise ContractError(
            f"The checkpoint {folder} contradicts itself: its contract names the cameras {promised}, its"
            f" config {config.camera_keys}."
        )
    state = contract.interface.state.dim if contract.interface.state else 0
    for what, here, there in (
        ("state size", state, config.state_dim),
        ("action size", contract.interface.action.dim, config.action_dim),
        ("chunk size", contract.chunk_size, config.chunk_size),
    ):
        if here != there:
            raise ContractError(
                f"The checkpoint {folder} contradicts itself: its contract has {what} {here},"
                f" its config {there}."
            )


def _require_same_statistics(
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    config: CogMergeConfig,
    contract: PolicyContract,
    folder: Path,
) -> None:
    require_statistics(config, contract.statistics)
    for pipeline, kind in (
        (preprocessor, NormalizerProcessorStep),
        (postprocessor, UnnormalizerProcessorStep),
    ):
        steps = [step for step in pipeline.steps if isinstance(step, kind)]
        if len(steps) != 1:
            raise UserError(
                f"The processors in {folder} do not normalise exactly once; copy the checkpoint again."
            )
        require_statistics(config, steps[0].stats)
        keys = [ACTION_KEY] if kind is UnnormalizerProcessorStep else list(contract.statistics)
        for key in keys:
            for name, numbers in contract.statistics[key].items():
                used = np.asarray(steps[0].stats[key].get(name, np.nan), dtype=np.float32)
                if not np.array_equal(used, np.asarray(numbers, dtype=np.float32)):
                    raise ContractError(
                        f"The statistic '{name}' of '{key}' in the processors of {folder} differs from the"
                        " contract: the file was edited or mixed up."
                    )

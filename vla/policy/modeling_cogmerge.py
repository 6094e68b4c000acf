"""LeRobot's second face of the policy: losses, action chunks and saving around `CogMergeModel`."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import torch
from lerobot.policies import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from safetensors import SafetensorError
from torch import Tensor
from transformers.initialization import no_init_weights

from vla.contract import PolicyContract
from vla.errors import UserError
from vla.policy.configuration_cogmerge import CogMergeConfig
from vla.policy.images import unit_range
from vla.policy.manifest import contract_from_metadata, describe_build, save_manifest
from vla.policy.model import CogMergeModel, Prediction
from vla.policy.units import unit_classes

KEYFRAME_KEY = "keyframe"


class CogMergePolicy(PreTrainedPolicy):
    """The CogMerge policy as LeRobot trains, saves, loads and runs it.

    `dataset_meta` (LeRobot's dataset metadata) lets the policy write its contract beside its weights;
    without it `contract` stays None until somebody sets it. A new policy takes the weights of its backbones
    from where the configuration says; with ``pretrained_backbones=False`` all weights are fresh, which is
    what loading a checkpoint wants.
    """

    config_class = CogMergeConfig
    name = "cogmerge"

    def __init__(
        self,
        config: CogMergeConfig,
        dataset_stats=None,
        dataset_meta=None,
        pretrained_backbones: bool = True,
        **kwargs: Any,
    ):
        super().__init__(config)
        config.validate_features()
        if pretrained_backbones and config.head_seed is None:
            config.head_seed = torch.initial_seed()
        self.model = CogMergeModel(config, pretrained_backbones)
        self.contract: PolicyContract | None = None
        if dataset_meta is not None:
            self.contract = contract_from_metadata(config, dataset_meta)
        self.reset()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any):
        """Load a checkpoint as LeRobot does; where its backbones once came from is not asked."""
        # Every weight is in the file, or loading it fails; drawing random ones first takes 26 s at 0.5 B.
        with no_init_weights():
            return super().from_pretrained(*args, pretrained_backbones=False, **kwargs)

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes that FSDP wraps, read by accelerate."""
        return unit_classes(self.model)

    _fsdp_wrap_modules = _no_split_modules  # LeRobot's name for the same

    def reset(self) -> None:
        """Forget the queued actions; call it whenever an episode starts."""
        self._queue: deque[Tensor] = deque()

    def get_optim_params(self) -> list[dict[str, Any]]:
        """Parameter groups: matrices decay, everything else (norms, biases, embeddings, tokens) does not."""
        decay, keep = [], []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                matrix = parameter.ndim >= 2 and name.endswith("weight") and "embed_tokens" not in name
                (decay if matrix else keep).append(parameter)
        return [{"params": decay}, {"params": keep, "weight_decay": 0.0}]

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """Loss of a preprocessed batch, and its parts as floats.

        Reads the cameras (B, 3, S, S), ``observation.state`` (B, state_dim), the instruction tokens,
        ``action`` (B, K, D) and, where present, ``action_is_pad`` (B, K), ``keyframe`` (B, F) in the
        state's units, relative to now, and ``keyframe_is_pad`` (B,) bool (True: no event ahead). Without
        ``keyframe`` the loss is the action loss alone. ``reduction="none"`` gives one loss per sample, (B,).
        """
        predicted = self.predict(batch)
        decoder = self.model.action_decoder
        action_loss = decoder.loss(predicted.actions, batch[ACTION].float(), batch.get("action_is_pad"))
        losses = {"action_loss": action_loss}
        total = action_loss
        if predicted.keyframe is not None and KEYFRAME_KEY in batch:
            losses["keyframe_loss"] = self._keyframe_loss(predicted.keyframe, batch)
            total = total + self.config.keyframe_weight * losses["keyframe_loss"]
        report = {name: loss.detach().mean().item() for name, loss in losses.items()}
        return (total.mean() if reduction == "mean" else total), report

    def _keyframe_loss(self, predicted: Tensor, batch: dict[str, Any]) -> Tensor:
        """L1 distance to the next gripper event per sample, (B,), in `keyframe_unit`; pads count 0."""
        error = (predicted - batch[KEYFRAME_KEY].float()).abs().mean(-1) / self.config.keyframe_unit
        is_pad = batch.get(f"{KEYFRAME_KEY}_is_pad")
        return error if is_pad is None else error.masked_fill(is_pad.reshape(-1), 0.0)

    def predict(self, batch: dict[str, Any], trace: dict | None = None) -> Prediction:
        """Run the model on a preprocessed batch; `trace` as in `CogMergeModel.forward`."""
        images = torch.stack([unit_range(batch[key]) for key in self.config.camera_keys], dim=1)
        state = batch[OBS_STATE].float() if self.config.state_dim else None
        return self.model(
            images, state, batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK], trace
        )

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """Normalised action chunk (B, K, D) for a preprocessed batch. Holds and changes no state."""
        self.eval()
        return self.predict(batch).actions

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """Next normalised action (B, D): from the queue, or from a fresh chunk when it is empty."""
        if not self._queue:
            chunk = self.predict_action_chunk(batch)
            self._queue.extend(chunk[:, : self.config.n_action_steps].unbind(1))
        return self._queue.popleft()

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save_pretrained(save_directory, state_dict)
        if self.contract is not None:
            self.contract.save(save_directory)
            save_manifest(save_directory, describe_build(self))

    @classmethod
    def _load_as_safetensor(cls, model, model_file: str, map_location: str, strict: bool):
        # LeRobot asks for strict=False, which leaves missing tensors at their random initialisation.
        try:
            return super()._load_as_safetensor(model, model_file, map_location, strict=True)
        except FileNotFoundError:
            raise UserError(f"{model_file} does not exist; the checkpoint is incomplete.") from None
        except SafetensorError as error:
            raise UserError(
                f"{model_file} is truncated or not a safetensors file ({error}); copy the checkpoint again."
            ) from None
        except RuntimeError as error:
            raise UserError(
                f"The weights in {model_file} do not fit the policy that its config.json describes:"
                f" {' '.join(str(error).split())}"
            ) from None

"""LeRobot's third face of the policy: what happens to a batch before and after the model.

Before: (rename, batch axis,) area-resize to the policy's size, instruction to ids, device, normalise.
After: un-normalise, CPU. Training and evaluation run these same steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lerobot.configs import FeatureType, NormalizationMode, PipelineFeatureType, PolicyFeature
from lerobot.processor import (
    EnvTransition,
    ObservationProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    ProcessorStepRegistry,
    TransitionKey,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from tokenizers import Tokenizer
from torch import Tensor

from vla.contract import IMAGE_PREFIX
from vla.errors import UserError
from vla.policy.configuration_cogmerge import CogMergeConfig
from vla.policy.images import resize_area, unit_range
from vla.policy.instruction import TOKENIZERS, encode, load_tokenizer

Features = dict[PipelineFeatureType, dict[str, PolicyFeature]]

NEEDED_STATISTICS = {
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
    NormalizationMode.IDENTITY: (),
}


@dataclass
@ProcessorStepRegistry.register(name="cogmerge_images")
class ResizeImagesStep(ObservationProcessorStep):
    """Area-resize every camera to `size` x `size` and give float32 in [0, 1] on the uint8 grid."""

    size: int = 128

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Resize the ``observation.images.*`` entries (..., 3, H, W), uint8 or float in [0, 1]."""
        return observation | {
            key: unit_range(resize_area(value, self.size))
            for key, value in observation.items()
            if key.startswith(IMAGE_PREFIX) and isinstance(value, torch.Tensor)
        }

    def get_config(self) -> dict[str, Any]:
        """Return what the checkpoint records of this step."""
        return {"size": self.size}

    def transform_features(self, features: Features) -> Features:
        """Return the features with the images' new size."""
        observed = features[PipelineFeatureType.OBSERVATION]
        resized = {
            key: PolicyFeature(type=feature.type, shape=(3, self.size, self.size))
            for key, feature in observed.items()
            if feature.type is FeatureType.VISUAL
        }
        return features | {PipelineFeatureType.OBSERVATION: observed | resized}


@dataclass
@ProcessorStepRegistry.register(name="cogmerge_instruction")
class InstructionStep(ObservationProcessorStep):
    """Turn the ``task`` strings into ``observation.language.tokens`` and their validity mask.

    `tokenizer` names a shipped tokenizer or a decoder's folder or hub name; `prompt` is what the instruction
    is put into. A decoder's tokenizer is saved with the step (the bytes of its ``tokenizer.json``, in the
    step's state file, which LeRobot's own loader brings back too) and never looked up again.
    """

    tokenizer: str = "nano"
    prompt: str = "{instruction}"
    _loaded: Tokenizer | None = field(default=None, init=False, repr=False, compare=False)

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        """Read the task from the transition; raise `UserError` if there is none."""
        self._task = (transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}).get("task")
        return super().__call__(transition)

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Add the token ids (B, T) and the mask (B, T)."""
        texts = [self._task] if isinstance(self._task, str) else self._task
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"The batch has no instruction: 'task' is {texts!r}, expected one string per sample."
            )
        tokens, valid = self.tokenize(list(texts))
        return observation | {OBS_LANGUAGE_TOKENS: tokens, OBS_LANGUAGE_ATTENTION_MASK: valid}

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, T) and their validity (B, T) of instructions, put into the prompt."""
        return encode([self.prompt.replace("{instruction}", text) for text in texts], self._tokenizer())

    def get_config(self) -> dict[str, Any]:
        """Return what the checkpoint records of this step."""
        return {"tokenizer": self.tokenizer, "prompt": self.prompt}

    def state_dict(self) -> dict[str, Tensor]:
        """Return a decoder's tokenizer as the bytes of its JSON; a shipped one is not saved."""
        if self.tokenizer in TOKENIZERS:
            return {}
        content = bytearray(self._tokenizer().to_str().encode())
        return {"tokenizer.json": torch.frombuffer(content, dtype=torch.uint8)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self._loaded = Tokenizer.from_str(state["tokenizer.json"].cpu().numpy().tobytes().decode())

    def _tokenizer(self) -> Tokenizer:
        if self._loaded is None:
            self._loaded = load_tokenizer(self.tokenizer)
        return self._loaded

    def transform_features(self, features: Features) -> Features:
        """Return the features unchanged: token ids are not a feature of the data."""
        return features


def make_cogmerge_pre_post_processors(
    config: CogMergeConfig, dataset_stats: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[PolicyProcessorPipeline[dict, dict], PolicyProcessorPipeline[PolicyAction, PolicyAction]]:
    """Build both pipelines for a policy that is trained on data with `dataset_stats`.

    Raises `UserError` when a statistic that normalisation needs is missing: LeRobot's normaliser would
    pass such a feature through untouched, and the policy would train and run on raw values.
    """
    require_statistics(config, dataset_stats or {})
    _require_vocabulary(config)
    steps = make_default_policy_processor_steps(config, dataset_stats, normalizer_device=config.device)
    return make_policy_processor_pipelines(
        input_steps=[
            steps.rename_observations,
            steps.add_batch_dim,
            ResizeImagesStep(size=config.image_size),
            InstructionStep(tokenizer=config.tokenizer, prompt=config.prompt),
            steps.to_device,
            steps.normalize,
        ],
        output_steps=[steps.unnormalize, steps.to_cpu],
    )


def _require_vocabulary(config: CogMergeConfig) -> None:
    """Raise `UserError` when the tokenizer gives ids that a pretrained decoder has no embedding for."""
    if config.decoder_config is None:
        return
    ids, rows = load_tokenizer(config.tokenizer).get_vocab_size(), config.decoder_config["vocab_size"]
    if ids > rows:
        raise UserError(
            f"The tokenizer '{config.tokenizer}' has {ids} tokens, the decoder embeds {rows}; use the"
            " decoder's own tokenizer."
        )


def require_statistics(config: CogMergeConfig, statistics: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `UserError` unless `statistics` has every number that normalising `config`'s features needs."""
    for key, feature in {**config.input_features, **config.output_features}.items():
        mode = config.normalization_mapping.get(feature.type.value, NormalizationMode.IDENTITY)
        for name in NEEDED_STATISTICS[mode]:
            numbers = statistics.get(key, {}).get(name)
            if numbers is None:
                raise UserError(
                    f"The statistic '{name}' of '{key}' is missing, but {mode.value} normalisation needs it;"
                    " recompute the dataset's statistics (lerobot-edit-dataset recompute_stats)."
                )
            if feature.type is not FeatureType.VISUAL and len(numbers) != feature.shape[0]:
                raise UserError(
                    f"The statistic '{name}' of '{key}' has {len(numbers)} entries, the feature has"
                    f" {feature.shape[0]}; the statistics belong to another dataset."
                )

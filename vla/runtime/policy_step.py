"""The whole policy step as one function of tensors: uint8 images in, actions in physical units out."""

from __future__ import annotations

import copy

from lerobot.processor import (
    NormalizerProcessorStep,
    TransitionKey,
    UnnormalizerProcessorStep,
    create_transition,
)
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn

from vla.errors import UserError
from vla.policy.checkpoint import LoadedPolicy
from vla.policy.modeling_cogmerge import CogMergePolicy
from vla.policy.processor_cogmerge import InstructionStep, ResizeImagesStep
from vla.runtime.split_text import SplitTextDecoder, can_split

#: Steps that move data between devices or rename and batch it; the engine does that itself.
_PLUMBING = ("rename_observations_processor", "to_batch_processor", "device_processor")


class PolicyStep(nn.Module):
    """Resize, normalise, predict, un-normalise: what a checkpoint's pipelines and network do, in one call.

    It shares the weights of `loaded` but none of its modules, whose wiring it changes: where the masks allow,
    the decoder runs text and observation as two streams. Raises `UserError` if the checkpoint's pipelines
    hold a step that is unknown here and would be left out.
    """

    def __init__(self, loaded: LoadedPolicy):
        super().__init__()
        before = _steps(loaded.preprocessor)
        after = _steps(loaded.postprocessor)
        self._resize = _only(before, ResizeImagesStep)
        self._instruction = _only(before, InstructionStep)
        self._normalize = _only(before, NormalizerProcessorStep)
        self._unnormalize = _only(after, UnnormalizerProcessorStep)
        if len(before) != 3 or len(after) != 1:
            names = ", ".join(type(step).__name__ for step in before + after)
            raise UserError(
                f"The runtime engine cannot reproduce the checkpoint's processing steps ({names}); run it"
                " without the engine."
            )
        self.policy = with_shared_weights(loaded.policy).eval().requires_grad_(False)
        self.config = self.policy.config
        model = self.policy.model
        if can_split(model.decoder):
            model.decoder = SplitTextDecoder(model.decoder)

    def tokens(self, instructions: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, T) and validity (B, T) of `instructions`, T a multiple of the bucket size."""
        given = create_transition(observation={}, complementary_data={"task": instructions})
        encoded = self._instruction(given)[TransitionKey.OBSERVATION]
        return encoded[OBS_LANGUAGE_TOKENS], encoded[OBS_LANGUAGE_ATTENTION_MASK]

    def forward(self, tokens: Tensor, valid: Tensor, images: Tensor, state: Tensor) -> Tensor:
        """Return actions (B, K, D) float32 in the units of the dataset.

        `tokens`, `valid` (B, T) as `tokens` gives them; `images` (B, I, 3, H, W) uint8 in the order of
        ``config.camera_keys``; `state` (B, state_dim) float32 in the units of the dataset.
        """
        observation = dict(zip(self.config.camera_keys, images.unbind(1), strict=True))
        observation = self._resize.observation(observation)
        if self.config.state_dim:
            observation[OBS_STATE] = state
        batch = self._normalize(create_transition(observation=observation))[TransitionKey.OBSERVATION]
        batch |= {OBS_LANGUAGE_TOKENS: tokens, OBS_LANGUAGE_ATTENTION_MASK: valid}
        actions = self.policy.predict(batch).actions
        return self._unnormalize(create_transition(action=actions))[TransitionKey.ACTION]


def with_shared_weights(policy: CogMergePolicy) -> CogMergePolicy:
    """Copy the modules of `policy` but none of its parameters and buffers."""
    tensors = [*policy.parameters(), *policy.buffers()]
    return copy.deepcopy(policy, memo={id(tensor): tensor for tensor in tensors})


def _steps(pipeline) -> list:
    """The steps of a pipeline that change values."""
    plumbing = [step for step in pipeline.steps if getattr(step, "_registry_name", None) in _PLUMBING]
    return [step for step in pipeline.steps if step not in plumbing]


def _only(steps: list, kind: type):
    found = [step for step in steps if isinstance(step, kind)]
    if len(found) != 1:
        raise UserError(f"The checkpoint's pipelines have {len(found)} {kind.__name__} steps, not one.")
    return found[0]

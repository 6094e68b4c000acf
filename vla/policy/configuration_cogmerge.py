"""LeRobot's first face of the policy: its configuration, registered as ``--policy.type=cogmerge``."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

from lerobot.configs import FeatureType, NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig

from vla.errors import UserError, nearest
from vla.policy.presets import preset

# Names only: LeRobot imports every configuration at start-up, modelling code when it is needed. A test
# holds them equal to the registries.
DECODERS = ("llama", "qwen2", "qwen3")
EXECUTIONS = ("coupled_mask", "coupled_two_call")
ACTION_DECODERS = ("parallel_l1", "coordinate_l1", "cross_attention", "self_attention")
REDUCERS = ("efa", "none", "average_pool", "fourier", "farthest_point")
PRUNERS = ("lfp", "none", "pyramid_drop", "feather", "random")
FUSIONS = ("gate", "concat")
GATES = ("vision", "mlp", "block")
MASKS = ("coupled", "causal", "full", "modality_mutual", "no_vision_to_vision")

_DECODER_SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "decoder_layers": "num_hidden_layers",
    "decoder_heads": "num_attention_heads",
    "decoder_kv_heads": "num_key_value_heads",
}


def patch_grid(image_size: int, patch: int) -> int:
    """Patches along one side of an image of `image_size` pixels, resized to the nearest multiple."""
    return max(1, round(image_size / patch))


@PreTrainedConfig.register_subclass("cogmerge")
@dataclass
class CogMergeConfig(PreTrainedConfig):
    """Sizes and training defaults of a CogMerge policy.

    Every field whose default is None is filled from `preset`; a value given by the user wins. The saved
    ``config.json`` holds the resolved values, so a later change of a preset does not alter a checkpoint.

    Sizes: images are square with side `image_size` (pixels) after the policy's own resize; each entry of
    `stem_strides` is one vision encoder; `aggregation_tokens` leave the encoder per camera;
    `keep_floor` and `keep_dense_above` are the LFP schedule (`vla.policy.routing.keep_counts`), whose
    mean is the budget of every pruner.

    Pretrained backbones: `vision_backbones` and `decoder_backbone` are local folders or hub names, whose
    weights a new policy starts from. They replace the encoders and the decoder built from sizes.
    `vision_configs` and `decoder_config` are what was found there; they are saved, so that a checkpoint is
    loaded without asking again. The decoder brings its `tokenizer`; `prompt` is what an instruction is put
    into. `vision_feature_layer` is the block whose output is taken (-2: the last but one, as in the papers),
    `vision_film` whether instructions modulate the blocks, `vision_fusion` how encoders are combined (see
    `vla.policy.vision.VisionTower`).

    Routing: `vision_reducer`, `token_pruner` and `attention_mask` name members of `REDUCERS`, `PRUNERS` and
    `MASKS`; `attention` names how the mask is executed.

    `router_gate` names what a router's weight scales (`GATES`, see `vla.policy.gating`). `parity` reproduces
    the released CogVLA code, for its checkpoints: sequence order, zero slots read one place early, positions
    renumbered in routed layers, its LFP router and its gate (`mlp`).

    `action_decoder` names a member of `ACTION_DECODERS`; `action_queries` tokens stand in the language model
    for those that read all its layers. `head_seed` is what the head's initial values follow from
    (`vla.policy.head`); a new policy takes torch's own seed, None is a checkpoint that does not say.

    `keyframe` adds one slot, or row of the action decoder, that predicts where the gripper acts next: how far
    the first `keyframe_dim` entries of the state are from where they will be then, in units of
    `keyframe_unit` (so that its loss is of the actions' size). Its loss counts with `keyframe_weight` and
    only when the batch brings the target. `action_space` is written
    into the contract when the dataset does not say what its actions mean.
    """

    preset: str = "nano"

    vision_backbones: list[str] | None = None
    vision_configs: list[dict[str, Any]] | None = None
    vision_feature_layer: int = -2
    vision_film: bool = True
    vision_fusion: str = "gate"
    decoder_backbone: str | None = None
    decoder_config: dict[str, Any] | None = None

    tokenizer: str | None = None
    prompt: str | None = None
    image_size: int | None = None
    stem_strides: list[int] | None = None
    stem_width: int | None = None
    vision_dim: int | None = None
    vision_layers: int | None = None
    vision_heads: int | None = None
    aggregation_tokens: int | None = None

    decoder: str | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    decoder_layers: int | None = None
    decoder_heads: int | None = None
    decoder_kv_heads: int | None = None
    keep_floor: float | None = None
    keep_dense_above: float | None = None
    vision_reducer: str = "efa"
    token_pruner: str = "lfp"
    attention_mask: str = "coupled"
    attention: str = "coupled_mask"
    router_gate: str | None = None
    parity: bool = False

    chunk_size: int | None = None
    n_action_steps: int | None = None
    action_decoder: str | None = None
    action_queries: int | None = None
    head_seed: int | None = None
    keyframe: bool | None = None
    keyframe_weight: float = 0.3
    keyframe_dim: int = 3
    keyframe_unit: float = 0.1
    action_space: str | None = None

    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MEAN_STD,
            # Not QUANTILES: where a rotation axis is nearly always still, q99 - q01 is tiny, LeRobot does
            # not clip, and the rare real rotations would dominate an L1 loss.
            "ACTION": NormalizationMode.MIN_MAX,
        }
    )
    dtype: str = "float32"

    optimizer_lr: float | None = None
    optimizer_weight_decay: float = 0.05
    optimizer_betas: tuple[float, float] = (0.9, 0.95)
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 200
    scheduler_decay_steps: int = 20_000
    scheduler_decay_lr: float = 1e-5

    def __post_init__(self) -> None:
        self._fill_from_preset()
        self._resolve_backbones()
        if self.router_gate is None:
            self.router_gate = "mlp" if self.parity else "vision"
        super().__post_init__()
        self._check_backbones()
        self._check_sizes()
        self._check_names()
        self._check_parity()

    def _fill_from_preset(self) -> None:
        # Another backbone than the preset's comes with its own sizes and its own tokenizer.
        replaced = set()
        if self.vision_backbones is not None:
            replaced |= {"vision_configs"}
        if self.decoder_backbone is not None:
            self.tokenizer = self.tokenizer or self.decoder_backbone
            replaced |= {"decoder_config"}
        for name, value in preset(self.preset).items():
            if getattr(self, name) is None and name not in replaced:
                setattr(self, name, copy.deepcopy(value))

    def _resolve_backbones(self) -> None:
        # Here, not above: naming a backbone is the only thing that needs transformers at this point.
        if self.vision_backbones and self.vision_configs is None:
            from vla.policy.pretrained import resolve_vision

            self.vision_configs = [resolve_vision(source) for source in self.vision_backbones]
        if self.decoder_backbone and self.decoder_config is None:
            from vla.policy.pretrained import resolve_decoder

            self.decoder_config = resolve_decoder(self.decoder_backbone)
        if self.decoder_config:
            self.decoder = self.decoder_config["model_type"]
            for ours, theirs in _DECODER_SIZES.items():
                setattr(self, ours, self.decoder_config[theirs])

    def _check_backbones(self) -> None:
        named, described = len(self.vision_backbones or ()), len(self.vision_configs or ())
        if named != described:
            raise UserError(
                f"policy.vision_configs describes {described} encoders, policy.vision_backbones names"
                f" {named}; name as many as are described."
            )
        for settings in self.vision_configs or ():
            depth = settings["num_hidden_layers"]
            if not -depth <= self.vision_feature_layer <= -1:
                raise UserError(
                    f"policy.vision_feature_layer={self.vision_feature_layer} must lie between -{depth} and"
                    f" -1: an encoder has {depth} blocks."
                )
        if "{instruction}" not in self.prompt:
            raise UserError(f"policy.prompt must contain '{{instruction}}', but is '{self.prompt}'.")
        grids = {self._patch_grid(index) for index in range(self._encoders)}
        if len(grids) > 1 and self.vision_reducer == "none":
            raise UserError(
                f"policy.vision_reducer=none cannot mix encoders of different strides: their patch grids"
                f" {sorted(grids)} give different token counts."
            )

    def _check_sizes(self) -> None:
        own = [] if self.vision_configs else [("vision_dim", "vision_heads")]
        for width, heads in own + ([] if self.decoder_config else [("hidden_size", "decoder_heads")]):
            if getattr(self, width) % (2 * getattr(self, heads)):
                raise UserError(
                    f"policy.{width}={getattr(self, width)} must be a multiple of 2 x policy.{heads}"
                    f" ({getattr(self, heads)}); change one of them."
                )
        if self.decoder_heads % self.decoder_kv_heads:
            raise UserError(
                f"policy.decoder_heads={self.decoder_heads} must be a multiple of"
                f" policy.decoder_kv_heads={self.decoder_kv_heads}."
            )
        for stride in () if self.vision_configs else self.stem_strides:
            if stride < 4 or stride & (stride - 1) or self.image_size % stride:
                raise UserError(
                    f"policy.stem_strides has {stride}, which must be a power of two >= 4 that divides"
                    f" policy.image_size={self.image_size}."
                )
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise UserError(
                f"policy.n_action_steps={self.n_action_steps} must lie between 1 and"
                f" policy.chunk_size={self.chunk_size}: no more actions can be executed than are predicted."
            )
        if self.action_queries < 1:
            raise UserError(f"policy.action_queries={self.action_queries} must be at least 1.")

    def _check_names(self) -> None:
        for name, known in (
            ("decoder", DECODERS),
            ("vision_fusion", FUSIONS),
            ("vision_reducer", REDUCERS),
            ("token_pruner", PRUNERS),
            ("router_gate", GATES),
            ("attention_mask", MASKS),
            ("attention", EXECUTIONS),
            ("action_decoder", ACTION_DECODERS),
        ):
            if getattr(self, name) not in known:
                raise UserError(
                    f"Unknown policy.{name} '{getattr(self, name)}'.{nearest(getattr(self, name), known)}"
                    f" Known: {', '.join(known)}."
                )
        if self.attention == "coupled_two_call" and self.attention_mask != "coupled":
            raise UserError(
                f"policy.attention=coupled_two_call computes the coupled mask only, not"
                f" policy.attention_mask={self.attention_mask}; use policy.attention=coupled_mask."
            )
        if self.dtype != "float32":
            raise UserError(
                f"policy.dtype={self.dtype}: weights are float32; in what they are multiplied is chosen where"
                " the policy runs (`vla train --precision`, `vla serve --engine`)."
            )

    def _check_parity(self) -> None:
        if not self.parity:
            return
        if self.action_decoder != "coordinate_l1" or self.keyframe:
            raise UserError(
                "policy.parity=true is the released code, which has policy.action_decoder=coordinate_l1 and"
                " policy.keyframe=false; set both."
            )
        if self.stop_token is None:
            raise UserError(
                "policy.parity=true needs the end-of-text token of a pretrained decoder; name one in"
                " policy.decoder_backbone."
            )

    @property
    def stop_token(self) -> int | None:
        """The decoder's end-of-text token, None for a decoder built from sizes."""
        end = (self.decoder_config or {}).get("eos_token_id")
        return end[0] if isinstance(end, list) else end

    @property
    def camera_keys(self) -> list[str]:
        """Image feature keys in the order in which the model sees the cameras (alphabetical)."""
        return sorted(self.image_features)

    @property
    def vision_grid(self) -> tuple[int, int]:
        """Rows and columns of the vision tokens that leave the encoder for one camera.

        The squarest grid of `aggregation_tokens` cells (16 is 4 x 4, 12 is 3 x 4), or all patches.
        """
        if self.vision_reducer == "none":
            return (self._patch_grid(0),) * 2
        count = self.aggregation_tokens
        rows = max(rows for rows in range(1, isqrt(count) + 1) if count % rows == 0)
        return rows, count // rows

    @property
    def _encoders(self) -> int:
        return len(self.vision_configs or self.stem_strides)

    def _patch_grid(self, encoder: int) -> int:
        """Patches along a side of the image in the encoder of that index."""
        if self.vision_configs:
            return patch_grid(self.image_size, self.vision_configs[encoder]["patch_size"])
        return self.image_size // self.stem_strides[encoder]

    @property
    def state_dim(self) -> int:
        """Entries of ``observation.state``, 0 when the dataset has none."""
        return self.robot_state_feature.shape[0] if self.robot_state_feature else 0

    @property
    def action_dim(self) -> int:
        """Entries of one action."""
        return self.action_feature.shape[0]

    @property
    def observation_delta_indices(self) -> None:
        """Only the current observation is read."""
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        """The chunk: the action of this step and of the next `chunk_size` - 1."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """No reward is read."""
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        """AdamW as `lerobot-train` and `vla train` use it unless told otherwise."""
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=self.optimizer_betas,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        """Linear warm-up and cosine decay."""
        return CosineDecayWithWarmupSchedulerConfig(
            peak_lr=self.optimizer_lr,
            decay_lr=self.scheduler_decay_lr,
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
        )

    def validate_features(self) -> None:
        """Raise `UserError` when the features cannot feed this model."""
        if not self.image_features:
            raise UserError("The policy needs at least one camera, but the data has no image feature.")
        if self.action_feature is None:
            raise UserError("The policy needs an 'action' feature, but the data has none.")
        for key, feature in self.image_features.items():
            if len(feature.shape) != 3 or feature.shape[0] != 3:
                raise UserError(
                    f"Camera '{key}' has shape {tuple(feature.shape)}; the policy reads (3, H, W)."
                )
        for key, feature in {**self.input_features, **self.output_features}.items():
            if feature.type in (FeatureType.STATE, FeatureType.ACTION) and len(feature.shape) != 1:
                raise UserError(
                    f"Feature '{key}' has shape {tuple(feature.shape)}; the policy reads vectors."
                )

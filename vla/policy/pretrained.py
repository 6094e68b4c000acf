"""Pretrained backbones: Hugging Face decoders and vision encoders from a local folder or a hub name.

`resolve_*` reads what a backbone looks like (its configuration, how it wants its images), `load_*` its
weights, `blank_*` builds it from the resolved configuration alone. A checkpoint holds the resolved
configuration, so that only the start of a training run ever asks a folder or the hub.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file

from vla.errors import UserError
from vla.json_file import load_json

DECODER_FAMILIES = ("llama", "qwen2", "qwen3")
"""Model types whose layers `vla.policy.decoder` walks; SmolLM and SmolLM2 are Llamas."""

VISION_FAMILIES: dict[str, type[PreTrainedModel]] = {
    "siglip_vision_model": SiglipVisionModel,
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
}
"""Model types whose blocks `vla.policy.pretrained_encoder` walks."""

#: What `preprocessor_config.json` would say, for folders without one.
_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
#: Facts about a file rather than about a model.
_NOT_ARCHITECTURE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


def resolve_decoder(source: str) -> dict[str, Any]:
    """Return the configuration of the decoder at `source`; raise `UserError` if we cannot walk its family."""
    found = _read_config(source)
    if found.model_type not in DECODER_FAMILIES:
        raise UserError(
            f"The decoder {source} is of the family '{found.model_type}'; the policy runs"
            f" {', '.join(DECODER_FAMILIES)} (SmolLM is a llama)."
        )
    if "sliding_attention" in (getattr(found, "layer_types", None) or ()):
        raise UserError(f"The decoder {source} uses sliding-window attention, which the policy does not run.")
    return _plain(found)


def resolve_vision(source: str) -> dict[str, Any]:
    """Return the configuration of the encoder at `source`, with ``image_mean`` and ``image_std`` (3 each)."""
    found = _read_config(source)
    found = found.vision_config if found.model_type == "siglip" else found
    if found.model_type not in VISION_FAMILIES:
        raise UserError(
            f"The vision encoder {source} is of the family '{found.model_type}'; the policy runs"
            f" {', '.join(VISION_FAMILIES)}."
        )
    image = _image_processing(source)
    mean, std = _HALF if found.model_type == "siglip_vision_model" else _IMAGENET
    return _plain(found) | {
        "image_mean": list(image.get("image_mean", mean)),
        "image_std": list(image.get("image_std", std)),
    }


def blank_decoder(settings: Mapping[str, Any]) -> PreTrainedModel:
    """Build the decoder that `settings` (from `resolve_decoder`) describes, with fresh weights."""
    return AutoModel.from_config(hf_config(settings))


def load_decoder(source: str, settings: Mapping[str, Any]) -> PreTrainedModel:
    """Load the decoder at `source` in fp32; raise `UserError` if it is not what `settings` describes.

    Its vocabulary may be smaller: OpenVLA pads Llama's 32000 tokens to 32064.
    """
    there = resolve_decoder(source)
    _require_same_shape(there, settings, source, except_for=("vocab_size",))
    config = hf_config(settings)
    config.vocab_size = there["vocab_size"]
    model = _load(source, AutoModel, config, may_lack=())
    if there["vocab_size"] > settings["vocab_size"]:
        raise UserError(
            f"The decoder {source} has {there['vocab_size']} tokens, the configuration only"
            f" {settings['vocab_size']}."
        )
    if there["vocab_size"] < settings["vocab_size"]:
        model.resize_token_embeddings(settings["vocab_size"])
    return model


def blank_vision(settings: Mapping[str, Any]) -> PreTrainedModel:
    """Build the encoder that `settings` (from `resolve_vision`) describes, with fresh weights."""
    return VISION_FAMILIES[settings["model_type"]](hf_config(settings))


def load_vision(source: str, settings: Mapping[str, Any]) -> PreTrainedModel:
    """Load the encoder at `source` in fp32; raise `UserError` if it is not what `settings` describes."""
    _require_same_shape(resolve_vision(source), settings, source)
    # The pooling head and the last norm are never used and thrown away at once.
    unused = ("head.", "post_layernorm.", "layernorm.", "pooler.")
    return _load(source, VISION_FAMILIES[settings["model_type"]], hf_config(settings), may_lack=unused)


def hf_config(settings: Mapping[str, Any]) -> PreTrainedConfig:
    """Return `settings` as the configuration class of transformers."""
    settings = dict(settings)
    for ours in ("image_mean", "image_std"):
        settings.pop(ours, None)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.use_cache = False
    return config


def _load(source: str, model_class: type, config: PreTrainedConfig, may_lack: tuple[str, ...]):
    def read(name: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        return model_class.from_pretrained(
            name, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )

    model, info = _ask(source, read)
    missing = sorted(
        name for name in info["missing_keys"] if not any(part in f"{name}." for part in may_lack)
    )
    if missing:
        raise UserError(
            f"The weights at {source} lack {len(missing)} tensors ({', '.join(missing[:5])}, ...); the"
            " download is incomplete or belongs to another model."
        )
    return model


def _image_processing(source: str) -> dict[str, Any]:
    """What ``preprocessor_config.json`` says, or nothing. transformers' own reader (5.5) ignores the file."""
    path = _ask(
        source, lambda s: cached_file(s, IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False)
    )
    return load_json(Path(path)) if path else {}


def _read_config(source: str) -> PreTrainedConfig:
    return _ask(source, AutoConfig.from_pretrained)


def _ask(source: str, read: Callable[[str], Any]) -> Any:
    """Call `read(source)` and turn what transformers says about a bad source into one sentence."""
    try:
        return read(source)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"The backbone '{source}' cannot be read: give a local folder or a hub name ({reason})."
        ) from None


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in _NOT_ARCHITECTURE}


_SHAPE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "mlp_ratio",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "patch_size",
    "image_size",
    "num_register_tokens",
)


def _require_same_shape(
    there: Mapping[str, Any], here: Mapping[str, Any], source: str, except_for: tuple[str, ...] = ()
) -> None:
    for name in _SHAPE:
        if name in except_for or name not in here or name not in there:
            continue
        if there[name] != here[name]:
            raise UserError(
                f"The backbone {source} has {name}={there[name]}, the policy's configuration says"
                f" {here[name]}; leave the sizes to the backbone or choose another one."
            )

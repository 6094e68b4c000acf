"""Named sizes of the one architecture.

A preset fills every `CogMergeConfig` field that the user left unset. Adding a size means adding one
entry here and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from vla.errors import UserError, nearest

#: About 2 M parameters; trains from scratch on two CPU cores. Widths are multiples of 64 (bf16 GEMM
#: tiles). The pruning floor is 0.5 instead of the paper's 0.15: with 32 vision tokens in all, 15 %
#: would leave 4, fewer than the objects in a scene.
NANO = MappingProxyType(
    {
        "tokenizer": "nano",
        "prompt": "{instruction}",
        "image_size": 128,
        "stem_strides": [16],
        "stem_width": 48,
        "vision_dim": 128,
        "vision_layers": 3,
        "vision_heads": 4,
        "aggregation_tokens": 16,
        "decoder": "llama",
        "hidden_size": 128,
        "intermediate_size": 384,
        "decoder_layers": 4,
        "decoder_heads": 4,
        "decoder_kv_heads": 4,
        "keep_floor": 0.5,
        "keep_dense_above": 0.85,
        "chunk_size": 8,
        "n_action_steps": 8,
        "action_decoder": "parallel_l1",
        "action_queries": 8,
        "keyframe": True,
        # It needs the warm-up: after 400 steps of the probe task of `vla.policy.vision` the loss was 0.24
        # with it and 0.53 without.
        "optimizer_lr": 1e-3,
    }
)

DINOV2_LARGE = MappingProxyType(
    {
        "model_type": "dinov2_with_registers",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "mlp_ratio": 4,
        "image_size": 518,
        "patch_size": 14,
        "num_register_tokens": 4,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
)
SIGLIP_SO400M = MappingProxyType(
    {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
)
#: OpenVLA pads the 32000 tokens to 32064.
LLAMA2_7B = MappingProxyType(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
)
QWEN25_05B = MappingProxyType(
    {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    }
)
#: OpenVLA's prompt; its trailing space is the token 29871 that its checkpoints expect last.
OPENVLA_PROMPT = "In: What action should the robot take to {instruction}?\nOut: "

#: The paper's token budget: 64 of 256 patches leave an encoder, the decoder keeps 15 % and more of them.
_DUAL_ENCODERS = {
    "vision_backbones": ["facebook/dinov2-with-registers-large", "google/siglip-so400m-patch14-224"],
    "vision_configs": [dict(DINOV2_LARGE), dict(SIGLIP_SO400M)],
    "image_size": 224,
    "aggregation_tokens": 64,
    "keep_floor": 0.15,
    "keep_dense_above": 0.85,
    "chunk_size": 8,
    "n_action_steps": 8,
    "action_queries": 64,
    "keyframe": False,
}

#: CogVLA at its published size, in OpenVLA's layout: about 8 B parameters.
COGVLA_7B = MappingProxyType(
    _DUAL_ENCODERS
    | {
        "decoder_backbone": "meta-llama/Llama-2-7b-hf",
        "decoder_config": dict(LLAMA2_7B),
        "tokenizer": "meta-llama/Llama-2-7b-hf",
        "prompt": OPENVLA_PROMPT,
        "action_decoder": "coordinate_l1",
        "optimizer_lr": 5e-4,  # CogVLA's, for LoRA of rank 32 and the new parts
    }
)

#: MergeVLA's size: the same encoders, a small decoder, and the action expert that can be merged.
MERGEVLA_05B = MappingProxyType(
    _DUAL_ENCODERS
    | {
        "decoder_backbone": "Qwen/Qwen2.5-0.5B",
        "decoder_config": dict(QWEN25_05B),
        "tokenizer": "Qwen/Qwen2.5-0.5B",
        "prompt": "What action should the robot take to {instruction}?",
        "action_decoder": "cross_attention",
        "optimizer_lr": 2e-4,  # MergeVLA's
    }
)

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"nano": NANO, "mergevla-0.5b": MERGEVLA_05B, "cogvla-7b": COGVLA_7B}
)


def preset(name: str) -> Mapping[str, Any]:
    """Return the dimensions of preset `name`; raise `UserError` with the nearest match if unknown."""
    if name not in PRESETS:
        raise UserError(
            f"Unknown policy preset '{name}'.{nearest(name, PRESETS)}"
            f" Known presets: {', '.join(sorted(PRESETS))}."
        )
    return PRESETS[name]

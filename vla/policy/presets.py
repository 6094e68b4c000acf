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
    }
)

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({"nano": NANO})


def preset(name: str) -> Mapping[str, Any]:
    """Return the dimensions of preset `name`; raise `UserError` with the nearest match if unknown."""
    if name not in PRESETS:
        raise UserError(
            f"Unknown policy preset '{name}'.{nearest(name, PRESETS)}"
            f" Known presets: {', '.join(sorted(PRESETS))}."
        )
    return PRESETS[name]

"""A configuration and batches small enough to test in milliseconds."""

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature

from vla.policy.configuration_cogmerge import CogMergeConfig
from vla.policy.instruction import encode

CAMERAS = ("observation.images.image", "observation.images.image2")


def small_config(**overrides) -> CogMergeConfig:
    sizes = {
        "image_size": 32,
        "stem_width": 16,
        "vision_dim": 32,
        "vision_layers": 2,
        "vision_heads": 2,
        "aggregation_tokens": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "decoder_layers": 3,
        "decoder_heads": 2,
        "decoder_kv_heads": 2,
        "chunk_size": 4,
        "n_action_steps": 4,
    } | overrides
    return CogMergeConfig(
        device="cpu",
        input_features={key: PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for key in CAMERAS}
        | {"observation.state": PolicyFeature(FeatureType.STATE, (8,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        **sizes,
    )


def random_batch(config: CogMergeConfig, texts: list[str], seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    size, count = config.image_size, len(texts)
    tokens, valid = encode(texts)
    batch = {key: torch.rand(count, 3, size, size, generator=generator) for key in config.camera_keys}
    return batch | {
        "observation.state": torch.randn(count, 8, generator=generator),
        "observation.language.tokens": tokens,
        "observation.language.attention_mask": valid,
        "action": torch.rand(count, config.chunk_size, 7, generator=generator) * 2 - 1,
        "action_is_pad": torch.zeros(count, config.chunk_size, dtype=torch.bool),
        "task": texts,
    }


@pytest.fixture(scope="session")
def make_config():
    return small_config


@pytest.fixture(scope="session")
def make_batch():
    return random_batch

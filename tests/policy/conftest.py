"""A configuration and batches small enough to test in milliseconds."""

import sys
from pathlib import Path

import pytest
import torch

from vla.policy.configuration_cogmerge import CogMergeConfig
from vla.policy.instruction import encode

sys.path.append(str(Path(__file__).parent))  # importlib mode leaves this folder off sys.path

from small_config import small_config


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

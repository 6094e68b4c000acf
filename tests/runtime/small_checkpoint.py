"""A policy small enough to trace in a second, with processors and contract, whose routers and FiLMs act."""

import sys
from pathlib import Path

import numpy as np
import torch

from vla.policy.checkpoint import LoadedPolicy
from vla.policy.manifest import make_contract
from vla.policy.modeling_cogmerge import CogMergePolicy
from vla.policy.presets import PRESETS
from vla.policy.processor_cogmerge import make_cogmerge_pre_post_processors
from vla.sim.simulation import sim_interface

sys.path.append(str(Path(__file__).parents[1] / "policy"))

from small_config import small_config

SIZE = 64
INSTRUCTIONS = (
    "open the drawer",
    "pick up the alphabet soup and place it in the basket next to the butter",
    "put the wine bottle on top of the cabinet",
)


def small_checkpoint(**changes) -> LoadedPolicy:
    interface = sim_interface(SIZE)
    config = small_config(**changes)
    generator = np.random.default_rng(0)
    statistics = {
        key: {
            "min": generator.uniform(-3, -1, n).tolist(),
            "max": generator.uniform(1, 3, n).tolist(),
            "mean": generator.normal(size=n).tolist(),
            "std": generator.uniform(0.5, 2, n).tolist(),
        }
        for key, n in (("observation.state", 8), ("action", 7))
    }
    torch.manual_seed(0)
    policy = CogMergePolicy(config, pretrained_backbones=False).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    stats = {
        key: {name: torch.tensor(numbers) for name, numbers in entry.items()}
        for key, entry in statistics.items()
    }
    processors = make_cogmerge_pre_post_processors(config, stats)
    return LoadedPolicy(policy, *processors, make_contract(config, interface, statistics), {}, Path("."))


def shrunk(preset: str) -> dict:
    """Settings of `preset`, of pretrained size, with its architecture and small numbers."""
    sizes = PRESETS[preset]
    width = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    vision = [{**config, **width} for config in sizes["vision_configs"]]
    vision[1] |= {"intermediate_size": 48, "image_size": 28}
    keys = 1 if sizes["decoder_config"]["num_key_value_heads"] < 14 else 2
    decoder = {**sizes["decoder_config"], **width}
    decoder |= {"num_key_value_heads": keys, "intermediate_size": 48, "vocab_size": 1200}
    return {
        "preset": preset,
        "vision_configs": vision,
        "decoder_config": decoder,
        "tokenizer": "nano",
        "image_size": 28,
        "action_queries": 6,
    }


def requests(count: int, seed: int = 0):
    generator = np.random.default_rng(seed)
    return [
        (
            {
                name: generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
                for name in ("image", "image2")
            },
            generator.normal(size=8).astype(np.float32),
            INSTRUCTIONS[i % len(INSTRUCTIONS)],
        )
        for i in range(count)
    ]

"""A policy of a few thousand parameters that speaks LIBERO's interface, and random experts on it."""

from dataclasses import replace

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature

from vla.contract import PolicyContract
from vla.experts.lora_expert import LoraExpert, declare, make_config
from vla.experts.multi_expert import Observation
from vla.policy.checkpoint import save_checkpoint
from vla.policy.configuration_cogmerge import CogMergeConfig
from vla.policy.manifest import describe_build, make_contract
from vla.policy.modeling_cogmerge import CogMergePolicy
from vla.policy.processor_cogmerge import make_cogmerge_pre_post_processors
from vla.sim.simulation import sim_interface

SIZE = 32
FULL = ("model.action_decoder", "model.keyframe_head")


def statistics(shift=0.0):
    return {
        key: {
            "min": [-1.0 + shift] * n,
            "max": [1.0 + 2 * shift] * n,
            "mean": [shift] * n,
            "std": [1.0 + shift] * n,
        }
        for key, n in (("observation.state", 8), ("action", 7))
    }


def save_tiny_base(folder, seed=0, **sizes):
    """Save an untrained base whose FiLM and routers are as loud as trained ones."""
    interface = sim_interface(SIZE)
    small = {
        "vision_dim": 16,
        "vision_layers": 2,
        "vision_heads": 2,
        "aggregation_tokens": 4,
        "stem_width": 8,
    }
    small |= {"hidden_size": 16, "intermediate_size": 24, "decoder_layers": 3, "decoder_heads": 2}
    small |= {"decoder_kv_heads": 2, "chunk_size": 8, "n_action_steps": 8, "image_size": SIZE}
    config = CogMergeConfig(
        device="cpu",
        input_features={c.key: PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE)) for c in interface.cameras}
        | {"observation.state": PolicyFeature(FeatureType.STATE, (8,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        **small | sizes,
    )
    torch.manual_seed(seed)
    policy = CogMergePolicy(config)
    with torch.no_grad():
        for parameter in policy.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    numbers = statistics()
    return save_checkpoint(
        folder,
        policy,
        *make_cogmerge_pre_post_processors(config, numbers),
        make_contract(config, interface, numbers),
        describe_build(policy, step=0),
    )


def save_tiny_expert(folder, base, seed, instructions=(), full=FULL, head_seed=1, scale=0.2):
    """Save an expert on all linear layers but those in `full`, which it has of its own."""
    from safetensors.torch import load_file

    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors, ranks = {}, {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if name.startswith(tuple(f"{part}." for part in full)):
            tensors[name] = weight + torch.randn(weight.shape, generator=generator) * scale
        elif name.endswith("proj.weight") or name.endswith((".q.weight", ".kv.weight", "mlp.0.weight")):
            rank = 2 + seed % 2
            ranks[module] = rank
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
            tensors[f"{module}.lora_B.weight"] = (
                torch.randn(weight.shape[0], rank, generator=generator) * scale
            )
    contract = replace(PolicyContract.load(base), statistics=statistics(0.1 * seed))
    LoraExpert(make_config(ranks, 4, full_modules=full), tensors, contract=contract).save(folder)
    declare(folder, folder.name, base, head_seed, instructions)
    return folder


def observation(seed=0, instruction="pick up the soup and place it in the basket"):
    generator = np.random.default_rng(seed)
    images = {
        name: generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for name in ("image", "image2")
    }
    return Observation(images, generator.normal(size=8).astype(np.float32), instruction)

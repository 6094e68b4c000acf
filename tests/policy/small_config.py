"""The configuration that tests of policy and runtime share: its forward pass takes milliseconds."""

from lerobot.configs import FeatureType, PolicyFeature

from vla.policy.configuration_cogmerge import CogMergeConfig

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

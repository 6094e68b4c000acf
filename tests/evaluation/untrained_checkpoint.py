"""Save the nano policy as it is before training, for the real simulator."""

from vla.sim.simulation import sim_interface


def save_untrained_nano(folder, *, seed=0, image_size=128):
    import torch
    from lerobot.configs import FeatureType, PolicyFeature

    from vla.policy.checkpoint import save_checkpoint
    from vla.policy.configuration_cogmerge import CogMergeConfig
    from vla.policy.manifest import describe_build, make_contract
    from vla.policy.modeling_cogmerge import CogMergePolicy
    from vla.policy.processor_cogmerge import make_cogmerge_pre_post_processors

    interface = sim_interface(image_size)
    shape = (3, image_size, image_size)
    config = CogMergeConfig(
        device="cpu",
        input_features={camera.key: PolicyFeature(FeatureType.VISUAL, shape) for camera in interface.cameras}
        | {"observation.state": PolicyFeature(FeatureType.STATE, (8,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
    )
    statistics = {
        key: {"min": [-1.0] * n, "max": [1.0] * n, "mean": [0.0] * n, "std": [1.0] * n}
        for key, n in (("observation.state", 8), ("action", 7))
    }
    torch.manual_seed(seed)
    policy = CogMergePolicy(config)
    stats = {
        key: {name: torch.tensor(numbers) for name, numbers in entry.items()}
        for key, entry in statistics.items()
    }
    return save_checkpoint(
        folder,
        policy,
        *make_cogmerge_pre_post_processors(config, stats),
        make_contract(config, interface, statistics),
        describe_build(policy, step=0),
    )

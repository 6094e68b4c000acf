import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature

from vla.errors import UserError
from vla.policy import attention, configuration_cogmerge, presets
from vla.policy.action_decoders import ACTION_DECODERS
from vla.policy.backbones import FAMILIES
from vla.policy.gating import GATES
from vla.policy.images import resize_area
from vla.policy.modeling_cogmerge import CogMergePolicy
from vla.policy.processor_cogmerge import make_cogmerge_pre_post_processors

TEXTS = ["open it", "pick up the alphabet soup and place it in the basket"]


def test_padded_steps_do_not_count(make_config, make_batch):
    config = make_config()
    policy = CogMergePolicy(config)
    batch = make_batch(config, TEXTS)
    batch["action_is_pad"][:, 2:] = True
    before = policy(batch)[0]
    batch["action"][:, 2:] += 100
    assert policy(batch)[0] == before
    batch["action_is_pad"][:] = True
    assert policy(batch)[0] == 0


def test_action_loss_is_the_mean_absolute_error(make_config, make_batch):
    config = make_config()
    policy = CogMergePolicy(config).eval()
    batch = make_batch(config, TEXTS)
    loss, parts = policy(batch)
    expected = (policy.predict_action_chunk(batch) - batch["action"]).abs().mean()
    torch.testing.assert_close(loss.detach(), expected)
    assert parts == {"action_loss": pytest.approx(expected.item())}


def test_keyframe_adds_its_weighted_distance(make_config, make_batch):
    config = make_config(keyframe_weight=0.5)
    policy = CogMergePolicy(config).eval()
    batch = make_batch(config, TEXTS)
    action_loss = policy(batch)[0]
    batch["keyframe"] = torch.tensor([[0.1, 0.0, -0.2], [9.0, 9.0, 9.0]])
    batch["keyframe_is_pad"] = torch.tensor([False, True])
    loss, parts = policy(batch)
    predicted = policy.predict(batch).keyframe[0]
    expected = (predicted - batch["keyframe"][0]).abs().mean() / 0.1 / 2  # two samples, one of them padding
    assert parts["keyframe_loss"] == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(loss, action_loss + 0.5 * expected)


def test_losses_per_sample_average_to_the_loss(make_config, make_batch):
    config = make_config()
    policy = CogMergePolicy(config)
    batch = make_batch(config, TEXTS)
    batch["action_is_pad"][0, 1:] = True
    each, _ = policy(batch, reduction="none")
    assert each.shape == (2,)
    torch.testing.assert_close(each.mean(), policy(batch)[0])


def test_forward_is_pure(make_config, make_batch):
    config = make_config()
    policy = CogMergePolicy(config)
    batch = make_batch(config, TEXTS)
    keys, state = set(batch), {k: v.clone() for k, v in policy.state_dict().items()}
    first = policy(batch)[0]
    assert torch.equal(first, policy(batch)[0]) and set(batch) == keys
    assert all(torch.equal(state[k], v) for k, v in policy.state_dict().items())


def test_uint8_and_float_images_are_the_same(make_config, make_batch):
    config = make_config()
    policy = CogMergePolicy(config)
    batch = make_batch(config, TEXTS)
    for key in config.camera_keys:
        batch[key] = (batch[key] * 255).round().to(torch.uint8)
    floats = batch | {key: batch[key].float() / 255 for key in config.camera_keys}
    torch.testing.assert_close(policy.predict_action_chunk(batch), policy.predict_action_chunk(floats))


def test_overfits_a_tiny_batch(make_config, make_batch):
    config = make_config()
    torch.manual_seed(0)
    policy = CogMergePolicy(config)
    batch = make_batch(config, ["open it", "close it", "push the plate", "open it"])
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=3e-3)
    for _ in range(200):
        loss, _ = policy(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.08


def test_actions_are_queued_until_the_chunk_is_used_up(make_config, make_batch):
    config = make_config(n_action_steps=2)
    policy = CogMergePolicy(config)
    first, second = make_batch(config, TEXTS, seed=1), make_batch(config, TEXTS, seed=2)
    chunk = policy.predict_action_chunk(first)
    assert torch.equal(policy.select_action(first), chunk[:, 0])
    assert torch.equal(policy.select_action(second), chunk[:, 1])
    assert torch.equal(policy.select_action(second), policy.predict_action_chunk(second)[:, 0])
    policy.reset()
    assert torch.equal(policy.select_action(first), chunk[:, 0])


def test_area_resize_is_the_block_mean_and_idempotent():
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    small = resize_area(image, 32)
    blocks = image.float().unflatten(1, (32, 2)).unflatten(3, (32, 2)).mean((2, 4))
    assert torch.equal(small, blocks.round().to(torch.uint8))
    assert torch.equal(resize_area(small, 32), small)
    assert torch.equal(resize_area(image.float() / 255, 32), small)


STATISTICS = {
    "observation.state": {"mean": torch.arange(8.0), "std": torch.full((8,), 2.0)},
    "action": {"min": -torch.ones(7), "max": torch.tensor([0.5] * 6 + [1.0])},
}


def test_processors_resize_tokenise_and_normalise(make_config):
    config = make_config()
    pre, post = make_cogmerge_pre_post_processors(config, STATISTICS)
    raw = {key: torch.rand(2, 3, 64, 64) for key in config.camera_keys} | {
        "observation.state": torch.arange(8.0).repeat(2, 1) + 4,
        "action": torch.tensor([0.5] * 6 + [-1.0]).repeat(2, 4, 1),
        "action_is_pad": torch.zeros(2, 4, dtype=torch.bool),
        "task": TEXTS,
    }
    batch = pre(raw)
    assert all(batch[key].shape == (2, 3, 32, 32) for key in config.camera_keys)
    torch.testing.assert_close(batch["observation.state"], torch.full((2, 8), 2.0))
    torch.testing.assert_close(batch["action"][0, 0], torch.tensor([1.0] * 6 + [-1.0]))
    assert batch["observation.language.tokens"].shape == (2, 16)
    torch.testing.assert_close(post(batch["action"]), raw["action"])
    assert torch.isfinite(CogMergePolicy(config)(batch)[0])


@pytest.mark.parametrize(
    ("key", "name"), [("observation.state", "std"), ("observation.state", "mean"), ("action", "max")]
)
def test_missing_statistic_is_refused(make_config, key, name):
    statistics = {k: {n: v for n, v in s.items() if (k, n) != (key, name)} for k, s in STATISTICS.items()}
    with pytest.raises(UserError, match=f"statistic '{name}' of '{key}' is missing"):
        make_cogmerge_pre_post_processors(make_config(), statistics)


def test_statistics_of_another_size_are_refused(make_config):
    other = STATISTICS | {"action": {"min": -torch.ones(6), "max": torch.ones(6)}}
    with pytest.raises(UserError, match="has 6 entries, the feature has 7"):
        make_cogmerge_pre_post_processors(make_config(), other)


def test_missing_instruction_is_refused(make_config):
    pre, _ = make_cogmerge_pre_post_processors(make_config(), STATISTICS)
    with pytest.raises(UserError, match="no instruction"):
        pre({"observation.state": torch.zeros(1, 8)})


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"preset": "nanno"}, "Unknown policy preset 'nanno'. Did you mean 'nano'"),
        ({"decoder": "lama"}, "Did you mean 'llama'"),
        ({"action_decoder": "paralel_l1"}, "Did you mean 'parallel_l1'"),
        ({"attention": "coupled_maks"}, "Did you mean 'coupled_mask'"),
        ({"n_action_steps": 9}, "between 1 and policy.chunk_size"),
        ({"stem_strides": [12]}, "power of two"),
        ({"hidden_size": 33}, "must be a multiple"),
        ({"dtype": "float8"}, "weights are float32.*--precision"),
    ],
)
def test_bad_configuration_is_refused_with_a_sentence(make_config, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        make_config(**overrides)


def test_names_in_the_configuration_are_those_that_exist():
    assert tuple(FAMILIES) == configuration_cogmerge.DECODERS
    assert tuple(attention.EXECUTIONS) == configuration_cogmerge.EXECUTIONS
    assert tuple(ACTION_DECODERS) == configuration_cogmerge.ACTION_DECODERS
    assert tuple(GATES) == configuration_cogmerge.GATES


def test_preset_fills_only_what_was_left_unset(make_config):
    config = make_config(stem_width=None, vision_dim=64)
    assert (config.stem_width, config.vision_dim) == (48, 64)


def test_a_preset_has_its_own_learning_rate_and_the_user_the_last_word(make_config):
    assert make_config().optimizer_lr == 1e-3
    assert make_config(optimizer_lr=3e-4).get_optimizer_preset().lr == 3e-4
    assert presets.MERGEVLA_05B["optimizer_lr"] == 2e-4 and presets.COGVLA_7B["optimizer_lr"] == 5e-4


def test_features_that_cannot_feed_the_model_are_refused(make_config):
    config = make_config()
    config.input_features = {"observation.state": PolicyFeature(FeatureType.STATE, (8,))}
    with pytest.raises(UserError, match="at least one camera"):
        CogMergePolicy(config)

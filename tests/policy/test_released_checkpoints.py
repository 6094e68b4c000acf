"""Checkpoints of OpenVLA-OFT and CogVLA: the same actions as their own composition, and strict refusals."""

import sys
from pathlib import Path

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature

from vla.errors import UserError
from vla.policy.configuration_cogmerge import CogMergeConfig
from vla.policy.masks import Layout
from vla.policy.modeling_cogmerge import CogMergePolicy
from vla.policy.released_checkpoints import convert, describe, normalised_name

sys.path.insert(0, str(Path(__file__).parent))
import released_models as released

CAMERAS = ("observation.images.image", "observation.images.image2")
PROMPTS = [[0, 7, 9, 4, 29], [0, 11, 12, 13, 40, 41, 42, 43, 29]]


def converted(tensors, **changes):
    """Our policy with the weights of `tensors`."""
    named = {normalised_name(name): value for name, value in tensors.items()}
    settings = describe(named, {"num_attention_heads": released.HEADS})
    config = CogMergeConfig(
        preset="cogvla-7b",
        device="cpu",
        input_features={key: PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for key in CAMERAS}
        | {"observation.state": PolicyFeature(FeatureType.STATE, (8,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        **settings | {"chunk_size": released.CHUNK, "n_action_steps": 1} | changes,
    )
    with torch.device("meta"):
        policy = CogMergePolicy(config, pretrained_backbones=False)
    policy.model.load_state_dict(convert(named, policy.model), assign=True)
    real = CogMergePolicy(config, pretrained_backbones=False)  # the meta device has no rotary tables either
    real.load_state_dict(policy.state_dict())
    return real.eval()


def observations(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    side = released.PATCH * released.GRID
    images = torch.rand(count, 2, 3, side, side, generator=generator)
    return images, torch.rand(count, 8, generator=generator) * 2 - 1


def padded(prompts):
    width = max(map(len, prompts)) + 3
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    return ids, torch.tensor([[i < len(prompt) for i in range(width)] for prompt in prompts])


@pytest.mark.parametrize("kind", ["cogvla", "cogvla_block_gate", "oft", "oft_film"])
def test_the_converted_model_computes_what_the_released_one_does(kind):
    """In one batch of prompts of different lengths, against one sample at a time."""
    tensors = {
        "oft": released.oft_tensors,
        "oft_film": lambda: released.oft_tensors(film=True),
    }.get(kind, released.cogvla_tensors)()
    changes = {"router_gate": "block"} if kind == "cogvla_block_gate" else {}
    policy = converted(tensors, **changes)
    theirs = released.Released(tensors, gate="block" if changes else "mlp")
    images, state = observations(2)
    ours = policy.model(images, state, *padded(PROMPTS)).actions
    for i, prompt in enumerate(PROMPTS):
        expected = theirs.actions(images[i], state[i], prompt)
        torch.testing.assert_close(ours[i], expected, atol=2e-5, rtol=1e-4)
    assert (ours[0] - ours[1]).abs().max() > 0.05


def test_parity_and_the_default_mode_differ():
    """Each of the released code's accidents shows: readout, gate, positions, order."""
    tensors = released.cogvla_tensors()
    images, state = observations(1)
    prompt = padded(PROMPTS[:1])
    policy = converted(tensors)
    parity = policy.model(images, state, *prompt).actions
    for part, name, value in (
        (policy.model.action_decoder, "early", 0),
        (policy.model.decoder, "gate", "block"),
        (policy.model.decoder, "parity", False),
    ):
        before = getattr(part, name)
        setattr(part, name, value)
        assert (policy.model(images, state, *prompt).actions - parity).abs().max() > 1e-3, name
        setattr(part, name, before)
    torch.testing.assert_close(policy.model(images, state, *prompt).actions, parity)


def test_truth_table_of_catten_in_the_released_order():
    """cogvla.md section 3 for [BOS | 2 vision | state | 3 prompt | 2 action | STOP]."""
    mask = Layout(text=1, vision=2, state=1 + 3, action=3).mask("coupled").dense[0, 0]
    first, state, prompt, action = slice(0, 3), slice(3, 4), slice(4, 7), slice(7, 10)
    causal = torch.ones(3, 3).tril().bool()
    assert torch.equal(mask[first, first], causal) and not mask[first, 3:].any()
    assert mask[state, :4].all() and not mask[state, 4:].any()
    assert mask[prompt, :4].all() and torch.equal(mask[prompt, prompt], causal)
    assert not mask[prompt, action].any() and mask[action].all()


def test_gradients_reach_every_released_part_but_the_last_routers_film():
    """Routers, FiLM, aggregation tokens, fusion, backbones: what CogVLA trains.

    Its gate scales MLP outputs alone. FiLM moves only the gates of vision tokens, and what the last layer
    adds to those is read by nobody; what the last but one adds, only where the last keeps the same token.
    The default gate, which scales what enters attention, has no such gap (tests/policy/test_model.py).
    """
    policy = converted(released.cogvla_tensors()).train()
    images, state = observations(2)
    policy.model(images, state, *padded(PROMPTS)).actions.abs().sum().backward()
    silent = {
        name.removeprefix("model.")
        for name, p in policy.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    }
    # A key bias shifts all logits of a query alike: no gradient, by mathematics.
    silent = {name for name in silent if not name.endswith(("k_proj.bias", "key.bias"))}
    last, before = (
        {
            f"decoder.routers.{layer}.{mlp}.{part}.{kind}"
            for mlp in ("scale", "shift")
            for part in (0, 2)
            for kind in ("weight", "bias")
        }
        for layer in (released.LAYERS - 1, released.LAYERS - 2)
    )
    assert last <= silent <= last | before


def test_a_bypassed_token_is_invisible_to_what_a_released_layer_keeps():
    policy = converted(released.cogvla_tensors())
    images, state = observations(1)
    decoder, layer, seen = policy.model.decoder, released.LAYERS - 2, {}
    original = decoder._routed

    def watched(module, given, chosen):
        if module is decoder.backbone.layers[layer]:
            seen["before"] = original(module, given, chosen)
            seen["column"] = next(i for i in range(given.layout.length) if i not in chosen.rows[0])
            given.x[:, seen["column"]] += 5.0
            seen["after"] = original(module, given, chosen)
        return original(module, given, chosen)

    decoder._routed = watched
    with torch.no_grad():
        policy.model(images, state, *padded(PROMPTS[:1]))
    changed = (seen["before"] != seen["after"]).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [seen["column"]]


def test_openvla_gives_backbones_and_projector_and_draws_the_head(tmp_path):
    tensors = released.openvla_tensors()
    first, again = converted(tensors, head_seed=3), converted(tensors, head_seed=3)
    weight = first.model.decoder.backbone.layers[2].mlp.up_proj.weight
    assert torch.equal(weight, tensors["language_model.model.layers.2.mlp.up_proj.weight"])
    assert torch.equal(first.model.vision.projectors[0][2].weight, tensors["projector.fc2.weight"])
    head = first.model.action_decoder.fc_in.weight
    assert head.std() > 0 and torch.equal(head, again.model.action_decoder.fc_in.weight)
    assert not torch.equal(head, converted(tensors, head_seed=4).model.action_decoder.fc_in.weight)
    images, state = observations(1)
    assert torch.isfinite(first.model(images, state, *padded(PROMPTS[:1])).actions).all()


def test_missing_and_unexpected_tensors_are_listed():
    tensors = released.cogvla_tensors()
    del tensors["moe_router.router.2.bias"]
    del tensors["action_head.model.fc2.weight"]
    tensors["language_model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(1)
    with pytest.raises(UserError) as refused:
        converted(tensors)
    message = str(refused.value)
    assert "lacks 2 tensors (action_head.model.fc2.weight, moe_router.router.2.bias)" in message
    assert "unexpected 1 tensors (language_model.model.layers.0.self_attn.q_proj.lora_A.weight)" in message


def test_a_tensor_of_another_shape_is_refused():
    tensors = released.cogvla_tensors()
    tensors["proprio_projector.fc1.weight"] = torch.zeros(released.HIDDEN, 7)
    with pytest.raises(UserError, match=r"state_projector.0.weight \(32, 7\) instead of \(32, 8\)"):
        converted(tensors)


def test_something_else_is_refused():
    with pytest.raises(UserError, match="not one of OpenVLA, OpenVLA-OFT or CogVLA"):
        converted({"model.weight": torch.zeros(2)})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"keyframe": True}, "policy.keyframe=false"),
        ({"action_decoder": "parallel_l1"}, "policy.action_decoder=coordinate_l1"),
        ({"router_gate": "mpl"}, "Did you mean 'mlp'"),
    ],
)
def test_parity_with_other_parts_is_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        converted(released.cogvla_tensors(), **changes)

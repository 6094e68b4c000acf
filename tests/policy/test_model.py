import pytest
import torch
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model, Qwen3Config, Qwen3Model

from vla.policy.backbones import build_decoder
from vla.policy.decoder import RoutedDecoder
from vla.policy.masks import Layout
from vla.policy.modeling_cogmerge import CogMergePolicy
from vla.policy.pruners.pruner import Budget, LayerInput
from vla.policy.routing import keep_counts

TEXTS = ["open it", "pick up the alphabet soup and place it in the basket"]


def routed(config, vision, floor=0.5):
    torch.manual_seed(0)
    budget = Budget(keep_counts(config.decoder_layers, vision, floor, 0.85), (1, 1, vision))
    return RoutedDecoder(build_decoder(config, 50), budget).eval()


@pytest.mark.parametrize(
    "family",
    [
        ("llama", LlamaConfig, LlamaModel),
        ("qwen2", Qwen2Config, Qwen2Model),
        ("qwen3", Qwen3Config, Qwen3Model),
    ],
)
def test_dense_causal_decoder_is_the_plain_transformers_model(make_config, family):
    name, config_class, model_class = family
    config = make_config(decoder=name, decoder_kv_heads=1)
    decoder = routed(config, 6, floor=1.0)
    assert not decoder.routers
    plain = model_class(
        config_class(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            attn_implementation="eager",
        )
    ).eval()
    plain.load_state_dict(decoder.backbone.state_dict())
    x = torch.randn(2, 14, 32)
    ours = decoder(x, Layout(text=7, vision=6, state=1, action=0))
    torch.testing.assert_close(ours, plain(inputs_embeds=x).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_mask_and_two_calls_agree_through_the_policy(make_config, make_batch):
    config = make_config()
    policy = CogMergePolicy(config).eval()
    batch = make_batch(config, TEXTS)
    outputs = []
    for execution in ("coupled_mask", "coupled_two_call"):
        policy.model.decoder.backbone.config._attn_implementation = execution
        outputs.append(policy.predict_action_chunk(batch))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_a_bypassed_token_is_invisible_and_unchanged(make_config):
    config = make_config(decoder_layers=2)
    decoder = routed(config, 8)
    layout = Layout(text=3, vision=8, state=1, action=2)
    x = torch.randn(1, layout.length, 32)
    mask = layout.mask("coupled")
    rotary = decoder.backbone.rotary_emb(x, torch.arange(layout.length)[None])

    def run(x):
        layer, given = decoder.backbone.layers[1], LayerInput(x, layout, mask, rotary)
        chosen = decoder.routers.select(1, layer, given, None)
        return decoder._routed(layer, given, chosen), chosen.vision(layout)

    y, kept = run(x)
    assert kept.shape == (1, decoder.counts[1]) and decoder.counts[1] < 8
    bypassed = next(i for i in range(8) if i not in kept[0])
    column = layout.text + bypassed
    torch.testing.assert_close(y[:, column], x[:, column], rtol=0, atol=0)
    # Rescaling keeps the direction, hence the RMS-normalised state and the ranking, but not the token.
    perturbed = x.clone()
    perturbed[:, column] *= 3.0
    y2, kept2 = run(perturbed)
    assert torch.equal(kept, kept2)
    others = [i for i in range(layout.length) if i != column]
    torch.testing.assert_close(y2[:, others], y[:, others], rtol=0, atol=0)


def test_routed_layer_computes_as_many_tokens_as_scheduled(make_config, make_batch):
    config = make_config()
    policy = CogMergePolicy(config).eval()
    trace = {}
    policy.predict(make_batch(config, TEXTS), trace)
    counts = policy.model.decoder.counts
    assert counts == (8, 4, 4)
    assert {layer: kept.shape for layer, kept in trace["kept"].items()} == {1: (2, 4), 2: (2, 4)}
    weights = trace["patch_weights"]
    assert weights.shape == (2, 2, 4, 2, 2) and (weights.sum((-1, -2)) <= 1 + 1e-5).all()


def test_result_does_not_depend_on_the_batch(make_config, make_batch):
    config = make_config()
    torch.manual_seed(1)
    policy = CogMergePolicy(config).eval()
    texts = [*TEXTS, "put the yellow and white mug in the microwave and close it, then turn off the stove"]
    together = make_batch(config, texts)
    chunk = policy.predict_action_chunk(together)
    for i, text in enumerate(texts):
        alone = make_batch(config, [text])
        for key in (*config.camera_keys, "observation.state"):
            alone[key] = together[key][i : i + 1]
        torch.testing.assert_close(policy.predict_action_chunk(alone), chunk[i : i + 1], atol=2e-5, rtol=1e-4)


def test_gradients_reach_every_parameter(make_config, make_batch):
    """Routers, FiLM, aggregation tokens, both encoders and the gate between them; text rows that occur."""
    config = make_config(stem_strides=[8, 16])
    torch.manual_seed(0)
    policy = CogMergePolicy(config)
    for name, parameter in policy.named_parameters():
        if "film" in name:  # zero-initialised: identity FiLM passes no gradient to its condition
            torch.nn.init.normal_(parameter, std=0.02)
    batch = make_batch(config, TEXTS) | {"keyframe": torch.randn(2, 3)}
    policy(batch)[0].backward()
    silent = [name for name, p in policy.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_the_instruction_matters_from_the_first_layer(make_config, make_batch):
    config = make_config()
    policy = CogMergePolicy(config).eval()
    a, b = (make_batch(config, [text]) for text in ("open it", "close it"))
    assert (policy.predict_action_chunk(a) - policy.predict_action_chunk(b)).abs().max() > 1e-6


def test_policy_without_state_or_keyframe(make_config, make_batch):
    config = make_config(keyframe=False)
    del config.input_features["observation.state"]
    policy = CogMergePolicy(config)
    batch = make_batch(config, TEXTS)
    del batch["observation.state"]
    loss, parts = policy(batch | {"keyframe": torch.zeros(2, 3)})
    assert parts == {"action_loss": pytest.approx(loss.item())}


def test_nano_is_about_two_million_parameters_and_fits_the_package(make_config):
    from vla.policy.presets import NANO

    policy = CogMergePolicy(make_config(**NANO))
    count = sum(p.numel() for p in policy.parameters())
    assert 1.5e6 < count < 3e6 and count * 4 < 16e6


def test_aggregation_tokens_start_from_their_own_region(make_config):
    """Before any block, brightening one corner moves only that corner's token (4 tokens on a 2 x 2 grid)."""
    from vla.policy.vision import AggregationEncoder

    torch.manual_seed(0)
    encoder = AggregationEncoder(2, 4, make_config(), condition_dim=32)
    assert encoder.cells == (2, 2)
    for block in encoder.blocks:  # residual branches off: what remains is where the tokens start
        for layer in (block.out, block.mlp[-1]):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    images = torch.rand(1, 2, 3, 32, 32)
    brighter = images.clone()
    brighter[:, 0, :, :12, :12] += 0.5
    condition = torch.zeros(1, 32)
    moved = (encoder(brighter, condition) - encoder(images, condition)).abs().amax(-1)[0] > 1e-5
    assert moved.tolist() == [True] + [False] * 7

"""Action decoders: what every one promises, and the attention of the cross-attention ones by hand."""

import json
import math
from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot.configs import PreTrainedConfig
from transformers import LlamaConfig, LlamaModel

from vla.errors import UserError
from vla.inspection import count_operations, preset_policy
from vla.policy.action_decoders import ACTION_DECODERS
from vla.policy.action_decoders.action_decoder import Readout
from vla.policy.action_decoders.cross_attention import CrossAttention, CrossAttentionBlock
from vla.policy.backbones import build_decoder
from vla.policy.configuration_cogmerge import CogMergeConfig
from vla.policy.decoder import RoutedDecoder
from vla.policy.head import PARTS, head_parts, initialise_head
from vla.policy.masks import Layout
from vla.policy.modeling_cogmerge import CogMergePolicy
from vla.policy.pruners.pruner import Budget

TEXTS = ["open it", "pick up the alphabet soup and place it in the basket"]
LAYERED = [name for name, decoder in ACTION_DECODERS.items() if decoder.reads_layers]
every_decoder = pytest.mark.parametrize("name", ACTION_DECODERS)
layered = pytest.mark.parametrize("name", LAYERED)


def policy_with(make_config, name, seed=0, **changes):
    torch.manual_seed(seed)
    return CogMergePolicy(make_config(action_decoder=name, **changes))


# -- every decoder -------------------------------------------------------------------------------------


@every_decoder
@pytest.mark.parametrize("keyframe", [True, False])
def test_shapes_and_a_sample_does_not_depend_on_its_batch(make_config, make_batch, name, keyframe):
    policy = policy_with(make_config, name, keyframe=keyframe).eval()
    batch = make_batch(policy.config, TEXTS)
    with torch.no_grad():
        both = policy.predict(batch)
        alone = policy.predict(make_batch(policy.config, TEXTS) | {k: v[:1] for k, v in batch.items()})
    assert both.actions.shape == (2, 4, 7) and both.actions.dtype == torch.float32
    torch.testing.assert_close(alone.actions, both.actions[:1], atol=2e-5, rtol=1e-4)
    assert (both.keyframe is None) != keyframe
    if keyframe:
        assert both.keyframe.shape == (2, 3)


@every_decoder
def test_gradients_reach_every_parameter(make_config, make_batch, name):
    policy = policy_with(make_config, name)
    for parameter_name, parameter in policy.named_parameters():
        if "film" in parameter_name:  # zero-initialised: identity FiLM passes no gradient to its condition
            torch.nn.init.normal_(parameter, std=0.02)
    batch = make_batch(policy.config, TEXTS) | {"keyframe": torch.randn(2, 3)}
    policy(batch)[0].backward()
    silent = [n for n, p in policy.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@every_decoder
def test_state_instruction_and_images_all_matter(make_config, make_batch, name):
    policy = policy_with(make_config, name).eval()
    batch = make_batch(policy.config, TEXTS[:1])
    chunk = policy.predict_action_chunk(batch)
    changes = {
        "observation.state": -batch["observation.state"],
        policy.config.camera_keys[1]: 1 - batch[policy.config.camera_keys[1]],
        "observation.language.tokens": make_batch(policy.config, ["shut it"])["observation.language.tokens"],
    }
    for key, value in changes.items():
        moved = (policy.predict_action_chunk(batch | {key: value}) - chunk).abs().max()
        assert moved > 1e-6, key


@every_decoder
def test_works_without_a_robot_state(make_config, make_batch, name):
    config = make_config(action_decoder=name)
    del config.input_features["observation.state"]
    policy = CogMergePolicy(config)
    batch = make_batch(config, TEXTS)
    del batch["observation.state"]
    assert policy(batch)[0].isfinite() and policy.model.state_projector is None


@every_decoder
def test_a_saved_policy_loads_and_acts_the_same(make_config, make_batch, name, tmp_path):
    policy = policy_with(make_config, name, action_queries=3).eval()
    policy.save_pretrained(tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path)
    assert (config.action_decoder, config.action_queries) == (name, 3)
    loaded = CogMergePolicy.from_pretrained(tmp_path, config=config)
    batch = make_batch(policy.config, TEXTS)
    assert torch.equal(loaded.predict_action_chunk(batch), policy.predict_action_chunk(batch))


def test_the_weights_of_another_decoder_are_refused(make_config, tmp_path):
    policy_with(make_config, "parallel_l1").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="do not fit the policy that its config"):
        CogMergePolicy.from_pretrained(tmp_path, config=make_config(action_decoder="cross_attention"))


@every_decoder
def test_the_optimizer_decays_matrices_but_no_token_gate_or_norm(make_config, name):
    policy = policy_with(make_config, name)
    decay, keep = (group["params"] for group in policy.get_optim_params())
    names = {id(parameter): n for n, parameter in policy.named_parameters()}
    kept = {names[id(parameter)] for parameter in keep}
    assert len(decay) + len(kept) == len(names)
    for fragment in ("queries", "rows", ".gate", "embed_tokens", "slots", "bias", "norm_out"):
        assert all(n in kept for n in names.values() if fragment in n and "gate_proj" not in n), fragment
    assert {n for n in names.values() if n.endswith("feed.weight")}.isdisjoint(kept)


@every_decoder
def test_private_parts_name_parameters_that_exist(make_config, name):
    decoder = policy_with(make_config, name).model.action_decoder
    names = [n for n, _ in decoder.named_parameters()]
    for glob in decoder.private_parts:
        assert any(fnmatchcase(n, glob) for n in names), glob


@layered
def test_last_block_and_output_are_private_and_nothing_else(make_config, name):
    decoder = policy_with(make_config, name).model.action_decoder
    private = {
        n for n, _ in decoder.named_parameters() if any(fnmatchcase(n, g) for g in decoder.private_parts)
    }
    by_hand = {f"blocks.2.{n}" for n, _ in decoder.blocks[2].named_parameters()}
    assert private == by_hand | {"norm_out.weight", "norm_out.bias", "out.weight", "out.bias"}


def test_action_queries_must_be_at_least_one(make_config):
    with pytest.raises(UserError, match="action_queries=0 must be at least 1"):
        make_config(action_decoder="cross_attention", action_queries=0)


@every_decoder
def test_inspect_counts_the_operations_of_the_decoder(name):
    operations = count_operations(preset_policy("nano", action_decoder=name))
    assert operations["action_decoder"] > 0
    assert operations["total"] == sum(value for key, value in operations.items() if key != "total")


# -- what a decoder that reads layers is given -----------------------------------------------------------


def test_the_layers_are_the_hidden_states_of_transformers(make_config):
    torch.manual_seed(0)
    config = make_config(keep_floor=1.0)
    decoder = RoutedDecoder(build_decoder(config, 50), Budget((6, 6, 6), (1, 2, 3)), pruner="none").eval()
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "attn_implementation": "eager"}
    plain = LlamaModel(LlamaConfig(**sizes, **heads)).eval()
    plain.load_state_dict(decoder.backbone.state_dict())
    x, layers = torch.randn(2, 13, 32), []
    decoder(x, Layout(text=7, vision=6, state=0, action=0), layers=layers)
    theirs = plain(inputs_embeds=x, output_hidden_states=True).hidden_states[1:]
    assert len(layers) == len(theirs) == 3
    for ours, other in zip(layers, theirs, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)


@layered
def test_routing_stays_and_the_sequence_ends_with_the_queries(make_config, make_batch, name):
    policy = policy_with(make_config, name, action_queries=5).eval()
    seen = []
    hook = policy.model.action_decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    trace = {}
    with torch.no_grad():
        policy.predict(make_batch(policy.config, TEXTS), trace)
    hook.remove()
    assert {layer: kept.shape for layer, kept in trace["kept"].items()} == {1: (2, 4), 2: (2, 4)}
    read = seen[0]
    assert (read.layout.vision, read.layout.state, read.layout.action) == (8, 0, 5)
    assert len(read.layers) == 3 and torch.equal(read.layers[-1], read.final)
    # A vision token that a routed layer bypassed is still read, unchanged since the layer before.
    before, after, kept = read.vision(read.layers[0]), read.vision(read.layers[1]), trace["kept"][1]
    for row in range(2):
        for token in range(8):
            assert torch.equal(before[row, token], after[row, token]) == (token not in kept[row])


def readout(layers, layout=None, state=None):
    layout = layout or Layout(text=1, vision=3, state=0, action=2)
    torch.manual_seed(1)
    states = [torch.randn(2, layout.length, 32) for _ in range(layers)]
    return Readout(layout, states[-1], state, states)


@layered
@pytest.mark.parametrize("block", range(3))
def test_block_i_reads_layer_i_and_no_text(make_config, name, block):
    torch.manual_seed(0)
    decoder = ACTION_DECODERS[name](make_config(action_decoder=name))
    read = readout(3)
    inputs = []
    decoder.blocks[block].register_forward_pre_hook(lambda _, given: inputs.append(given))
    actions, _ = decoder(read)
    _, h_action, h_vision = inputs[0]
    states = read.layers[block]
    rms = states.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(h_vision, (states / rms)[:, 1:4])
    torch.testing.assert_close(h_action, (states / rms)[:, 4:])
    for layer in read.layers:
        layer[:, 0] += 10  # the instruction, which speaks through the queries only
    assert torch.equal(decoder(read)[0], actions)


@layered
def test_the_state_stands_beside_the_queries_in_every_block(make_config, name):
    decoder = ACTION_DECODERS[name](make_config(action_decoder=name))
    state = torch.randn(2, 1, 32)
    inputs = []
    for block in decoder.blocks:
        block.register_forward_pre_hook(lambda _, given: inputs.append(given[1]))
    decoder(readout(3, state=state))
    assert len(inputs) == 3 and all(torch.equal(h[:, 2:], state) and h.shape[1] == 3 for h in inputs)


# -- the block, by hand ----------------------------------------------------------------------------------


def by_hand(block, x, h_action, h_vision):
    """The block's equations with loops over rows, heads and keys, in fp64."""
    weights = {n: p.double() for n, p in block.named_parameters()}

    def linear(name, value):
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    gate = 1 / (1 + math.exp(-weights["gate"].item()))
    width = x.shape[-1] // block.heads
    result = torch.zeros_like(x)
    for b in range(len(x)):
        for row in range(x.shape[1]):
            attended = []
            for head in range(block.heads):
                part = slice(head * width, (head + 1) * width)
                logits, values = [], []
                streams = [("action", "action", h, 1.0) for h in h_action[b]]
                streams += [("vision", "vision", h, gate) for h in h_vision[b]]
                if hasattr(block, "k_self"):
                    streams += [("action", "self", h, 1.0) for h in x[b]]
                for query, stream, h, factor in streams:
                    q = linear(f"q_{query}", x[b, row])[part]
                    logits.append(factor * (q @ linear(f"k_{stream}", h)[part]).item() / math.sqrt(width))
                    values.append(linear(f"v_{stream}", h)[part])
                exponentials = [math.exp(logit) for logit in logits]
                share = [e / sum(exponentials) for e in exponentials]
                attended.append(sum(s * v for s, v in zip(share, values, strict=True)))
            z = x[b, row] + linear("out", torch.cat(attended))
            z = (z - z.mean()) / torch.sqrt(z.var(unbiased=False) + block.norm.eps)
            z = z * weights["norm.weight"] + weights["norm.bias"]
            result[b, row] = linear("feed", z).clamp(min=0)
    return result


BLOCKS = {name: ACTION_DECODERS[name].block for name in LAYERED}


@layered
@settings(max_examples=12)
@given(
    heads=st.sampled_from([1, 2, 4]),
    rows=st.integers(1, 4),
    queries=st.integers(1, 3),
    vision=st.integers(1, 5),
    gate=st.floats(-4, 4),
    seed=st.integers(0, 2**16),
)
def test_block_is_its_equations(name, heads, rows, queries, vision, gate, seed):
    torch.manual_seed(seed)
    block = BLOCKS[name](8, heads).double()
    with torch.no_grad():
        block.gate.fill_(gate)
        block.norm.weight.normal_()
        block.norm.bias.normal_()
    x, h_action, h_vision = (torch.randn(2, n, 8, dtype=torch.float64) for n in (rows, queries, vision))
    with torch.no_grad():
        torch.testing.assert_close(block(x, h_action, h_vision), by_hand(block, x, h_action, h_vision))


def test_logits_of_a_case_small_enough_for_paper():
    """One head of two channels: s = [q_A k_A, sigma(g) q_T k_T] / sqrt(2), sigma(ln 3) = 3/4."""
    block = CrossAttentionBlock(2, 1)
    with torch.no_grad():
        for linear, factor in ((block.q_action, 1.0), (block.q_vision, 2.0)):
            linear.weight.copy_(factor * torch.eye(2))
            linear.bias.zero_()
        block.gate.fill_(math.log(3))
    x = torch.tensor([[[1.0, 2.0]]])
    k_action = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    k_vision = torch.tensor([[[1.0, 1.0]]])
    logits = block.logits(x, k_action, k_vision) * math.sqrt(2)
    torch.testing.assert_close(logits, torch.tensor([[[[1.0, 2.0, 0.75 * 6.0]]]]))


def attention_shares(block, x, h_action, h_vision):
    keys, _ = block.action_stream(x, h_action)
    return block.logits(x, keys, block.k_vision(h_vision)).softmax(-1)


@layered
def test_a_closed_gate_flattens_vision_and_does_not_remove_it(name):
    """sigma(g) = 0 leaves every vision key the logit 0: equal shares, of which the sum is not zero."""
    torch.manual_seed(0)
    block = BLOCKS[name](8, 2)
    x, h_action, h_vision = torch.randn(1, 3, 8), torch.randn(1, 2, 8), torch.randn(1, 5, 8) * 4
    open_shares = attention_shares(block, x, h_action, h_vision)[..., -5:]
    assert open_shares.std(-1).min() > 1e-4
    with torch.no_grad():
        block.gate.fill_(-1e4)
    shares = attention_shares(block, x, h_action, h_vision)[..., -5:]
    torch.testing.assert_close(shares, shares[..., :1].expand_as(shares))
    assert shares.min() > 0.01


def test_gates_start_at_one_half(make_config):
    decoder = CrossAttention(make_config(action_decoder="cross_attention"))
    assert [torch.sigmoid(block.gate).item() for block in decoder.blocks] == [0.5] * 3


def test_rows_of_cross_attention_do_not_see_each_other(make_config):
    """Changing one learned row moves that row's action only: what self-attention would break."""
    torch.manual_seed(0)
    decoder = CrossAttention(make_config(action_decoder="cross_attention"))
    read = readout(3)
    before, aim = decoder(read)
    with torch.no_grad():
        decoder.rows.tokens[1] += 1
    after, aim_after = decoder(read)
    moved = (after - before).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False, True, False, False] and torch.equal(aim, aim_after)


# -- learning --------------------------------------------------------------------------------------------


@layered
def test_overfits_a_tiny_batch(make_config, make_batch, name):
    policy = policy_with(make_config, name)
    batch = make_batch(policy.config, ["open it", "close it", "push the plate", "open it"])
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=3e-3)
    for step in range(80):
        loss, _ = policy(batch)
        if step == 0:
            assert loss > 0.5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.08


@layered
def test_nano_grows_by_less_than_a_million_parameters(name):
    sizes = {n: sum(p.numel() for p in preset_policy("nano", action_decoder=n).parameters()) for n in
             ("parallel_l1", name)}  # fmt: skip
    assert 0 < sizes[name] - sizes["parallel_l1"] < 1e6


def test_the_presets_say_how_many_queries():
    assert CogMergeConfig(device="cpu").action_queries == 8


def test_the_published_size_has_the_published_parameters():
    """24 blocks of 6,431,489 parameters; 6.44 M of the head are a task's own (block 23, norm and output)."""
    with torch.device("meta"):
        policy = preset_policy("mergevla-0.5b")
    decoder = policy.model.action_decoder
    assert [sum(p.numel() for p in block.parameters()) for block in decoder.blocks] == [6_431_489] * 24
    private = [
        p for n, p in decoder.named_parameters() if any(fnmatchcase(n, g) for g in decoder.private_parts)
    ]
    assert sum(p.numel() for p in private) == 6_431_489 + 2 * 896 + 896 * 7 + 7
    assert decoder.queries.tokens.shape == (64, 896)


# -- where a head starts and what tasks share of it --------------------------------------------------------


def head_of(policy):
    return {n: p for n, p in policy.named_parameters() if n.split(".")[1] in PARTS}


@every_decoder
def test_a_head_follows_from_its_seed_and_nothing_else(make_config, name):
    """Another global seed, another vision tower, another order: the same head. Another seed: another head."""
    first = head_of(policy_with(make_config, name, seed=1, head_seed=7))
    other = policy_with(make_config, name, seed=2, head_seed=7, vision_layers=1, stem_width=8)
    assert first.keys() == head_of(other).keys()
    assert all(torch.equal(first[n], p) for n, p in head_of(other).items())
    again = head_of(policy_with(make_config, name, seed=1, head_seed=8))
    drawn = [
        n for n, p in first.items() if p.numel() > 1 and p.std() > 0 and not (p == 1).all()
    ]  # not constants
    assert len(drawn) > 4 and not any(torch.equal(first[n], again[n]) for n in drawn)


def test_building_a_head_leaves_the_global_generator_alone(make_config):
    torch.manual_seed(3)
    model = policy_with(make_config, "cross_attention", head_seed=7).model
    before = torch.get_rng_state()
    model.build_head()
    assert torch.equal(before, torch.get_rng_state())


def test_a_new_policy_records_its_head_seed_and_an_old_checkpoint_claims_none(make_config, tmp_path):
    policy = policy_with(make_config, "cross_attention", seed=11)
    assert policy.config.head_seed == 11
    policy.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings.pop("head_seed") == 11
    (tmp_path / "config.json").write_text(json.dumps(settings))
    old = CogMergePolicy.from_pretrained(tmp_path, config=PreTrainedConfig.from_pretrained(tmp_path))
    assert old.config.head_seed is None


def test_a_trained_policy_can_start_a_new_head(make_config, make_batch):
    policy = policy_with(make_config, "cross_attention", seed=1)
    fresh = policy_with(make_config, "cross_attention", seed=5, head_seed=9)
    body = {n: p.clone() for n, p in policy.named_parameters() if n not in head_of(policy)}
    with torch.no_grad():
        for parameter in head_of(policy).values():
            parameter.add_(1)
    policy.model.action_decoder.double()
    initialise_head(policy, 9)
    assert policy.config.head_seed == 9
    assert all(p.dtype == torch.float64 for p in policy.model.action_decoder.parameters())
    expected = head_of(fresh)
    assert all(torch.equal(p, expected[n].to(p.dtype)) for n, p in head_of(policy).items())
    assert all(torch.equal(p, policy.get_parameter(n)) for n, p in body.items())


@every_decoder
@pytest.mark.parametrize("keyframe", [True, False])
def test_shared_and_private_globs_cover_the_head_and_match_what_exists(make_config, name, keyframe):
    policy = policy_with(make_config, name, keyframe=keyframe)
    parts, names = head_parts(policy), [n for n, _ in policy.named_parameters()]
    matched = {g: {n for n in names if fnmatchcase(n, g)} for g in (*parts.shared, *parts.private)}
    assert all(matched.values())
    assert set().union(*matched.values()) == set(head_of(policy))
    private = set().union(*(matched[g] for g in parts.private))
    assert all(n in private for n in names if "keyframe_head" in n or n.endswith("action_decoder.out.bias"))


def test_of_cross_attention_the_trunk_the_queries_and_the_state_are_shared(make_config):
    policy = policy_with(make_config, "cross_attention")
    parts = head_parts(policy)
    private = {n for n in head_of(policy) if any(fnmatchcase(n, g) for g in parts.private)}
    shared = set(head_of(policy)) - private
    kinds = {n.split("action_decoder.")[-1].rsplit(".", 1)[0].split(".q_")[0] for n in shared}
    assert {"queries", "rows", "blocks.0", "blocks.1", "model.state_projector.0"} <= kinds
    assert not any("blocks.2" in n for n in shared)

"""Reducers, pruners and masks by name: what each promises by hand-worked cases, and what all must keep."""

import itertools

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn

from vla.errors import UserError
from vla.policy import configuration_cogmerge as names
from vla.policy.masks import MASKS, Layout
from vla.policy.modeling_cogmerge import CogMergePolicy
from vla.policy.pruners import PRUNERS
from vla.policy.pruners.feather import uniform_sample
from vla.policy.pruners.pruner import Budget, LayerInput, among, attention_scores, staged_counts
from vla.policy.reducers import REDUCERS
from vla.policy.reducers.farthest_point import farthest_point
from vla.policy.reducers.fourier import fourier
from vla.policy.routing import keep_counts

TEXTS = ["open it", "pick up the alphabet soup and place it in the basket"]


def test_the_names_of_the_configuration_are_those_of_the_registries():
    assert ("efa", *REDUCERS) == names.REDUCERS
    assert tuple(PRUNERS) == names.PRUNERS
    assert tuple(MASKS) == names.MASKS


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"token_pruner": "lpf"}, "Unknown policy.token_pruner 'lpf'. Did you mean 'lfp'"),
        ({"vision_reducer": "furier"}, "Unknown policy.vision_reducer 'furier'.*fourier"),
        ({"attention_mask": "causl"}, "Unknown policy.attention_mask 'causl'.*causal"),
        ({"attention_mask": "full", "attention": "coupled_two_call"}, "computes the coupled mask only"),
        ({"vision_reducer": "none", "stem_strides": [8, 4]}, "different strides"),
    ],
)
def test_a_bad_combination_is_refused_with_a_sentence(make_config, change, sentence):
    with pytest.raises(UserError, match=sentence):
        make_config(**change)


# -- every combination ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("reducer", "pruner"), [*itertools.product(names.REDUCERS, PRUNERS)])
def test_a_sample_does_not_depend_on_its_batch_and_every_parameter_learns(
    make_config, make_batch, reducer, pruner
):
    torch.manual_seed(0)
    sizes = {"decoder_layers": 4, "keyframe": False}
    config = make_config(vision_reducer=reducer, token_pruner=pruner, **sizes)
    policy = CogMergePolicy(config)
    loss, _ = policy(make_batch(config, TEXTS))
    loss.backward()
    unused = {name for name, parameter in policy.named_parameters() if parameter.grad is None}
    assert unused == set()
    policy.eval()
    both = make_batch(config, TEXTS)
    together = policy.predict_action_chunk(both)
    first = {key: value[:1] for key, value in both.items()}
    alone = policy.predict_action_chunk(first)
    torch.testing.assert_close(together[:1], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_keeping_all_is_the_dense_model_bit_for_bit(make_config, make_batch, pruner):
    outputs = []
    for name in ("none", pruner):
        torch.manual_seed(0)
        policy = CogMergePolicy(make_config(token_pruner=name, keep_floor=1.0)).eval()
        outputs.append(policy.predict_action_chunk(make_batch(policy.config, TEXTS)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("pruner", [name for name in PRUNERS if name != "none"])
def test_what_is_kept_is_ascending_and_within_the_budget(make_config, make_batch, pruner):
    torch.manual_seed(0)
    config = make_config(token_pruner=pruner, decoder_layers=8, aggregation_tokens=16, keep_floor=0.25)
    policy = CogMergePolicy(config).eval()
    model, batch, trace = policy.model, make_batch(config, TEXTS), {}
    images = torch.stack([batch[key] for key in config.camera_keys], 1)
    tokens, valid = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
    model(images, batch["observation.state"], tokens, valid, trace)
    counts = model.decoder.counts
    assert sum(counts) <= sum(keep_counts(8, 32, 0.25, 0.85))
    assert set(trace["kept"]) == {layer for layer, count in enumerate(counts) if count < 32}
    for layer, kept in trace["kept"].items():
        assert kept.shape == (2, counts[layer])
        assert (kept.diff(dim=1) > 0).all() and kept.min() >= 0 and kept.max() < 32
    if pruner in ("pyramid_drop", "feather"):  # dropped for good
        for earlier, later in itertools.pairwise(trace["kept"].values()):
            assert all(set(b.tolist()) <= set(a.tolist()) for a, b in zip(earlier, later, strict=True))


# -- pruners -------------------------------------------------------------------------------------------


def test_stages_shrink_by_one_ratio_within_the_budget():
    budget = Budget((32, 24, 16, 16), (2, 4, 4))  # 88 in all
    # By hand: r = 0.7 gives 32 + 22 + 15 + 10 = 79 and r = 0.75 gives 32 + 24 + 18 + 13 = 87 (13.5 floored);
    # the 88th comes before 0.76: 32 + 24 + 18 + 14 = 88 at r = (14 / 32)^(1/3) = 0.7591.
    assert staged_counts(budget, (1, 2, 3)) == (32, 24, 18, 14)
    assert staged_counts(Budget((9, 9, 9), (1, 3, 3)), (1, 2)) == (9, 9, 9)


def test_the_token_that_the_slots_look_for_survives(make_config):
    """A key planted along the slots' query outlives every stage."""
    torch.manual_seed(0)
    config = make_config(token_pruner="pyramid_drop", decoder_layers=4, keep_floor=0.25)
    policy = CogMergePolicy(config).eval()
    decoder = policy.model.decoder
    layout = Layout(text=3, vision=8, state=1, action=2)
    for layer in decoder.backbone.layers:  # query and key agree, and nothing else writes into the stream
        layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight)
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    x = torch.randn(2, layout.length, 32)
    planted = torch.tensor([5, 2])
    x[:, -2:] = 4 * torch.randn(2, 1, 32)
    x[torch.arange(2), layout.text + planted] = x[:, -1]
    trace = {}
    decoder(x, layout, None, trace)
    last = trace["kept"][3]
    assert last.shape[1] < 8 and all(p in row for p, row in zip(planted.tolist(), last.tolist(), strict=True))


@pytest.mark.parametrize("family", names.DECODERS)
def test_attention_scores_are_the_rows_that_the_layer_itself_uses(make_config, family):
    torch.manual_seed(0)
    config = make_config(decoder=family, decoder_kv_heads=1)
    decoder = CogMergePolicy(config).eval().model.decoder
    layer, layout = decoder.backbone.layers[0], Layout(text=3, vision=8, state=1, action=2)
    valid = torch.ones(2, layout.length, dtype=torch.bool)
    valid[0, 2] = False
    x = torch.randn(2, layout.length, 32)
    mask, rotary = layout.mask("coupled", valid), decoder.backbone.rotary_emb(x, torch.arange(14)[None])
    scores = attention_scores(layer, LayerInput(x, layout, mask, rotary), rotate=True)
    # With one-hot values (token j carries e_j) a head's output is its attention row.
    attention = layer.self_attn
    attention.v_proj = torch.nn.Linear(32, attention.head_dim, bias=False)
    attention.o_proj = torch.nn.Identity()
    hook = attention.v_proj.register_forward_hook(
        lambda *_: torch.eye(layout.length, attention.head_dim).expand(2, -1, -1)
    )
    seen = attention(hidden_states=layer.input_layernorm(x), attention_mask=mask, position_embeddings=rotary)[
        0
    ]
    hook.remove()
    rows = seen.reshape(2, layout.length, 2, attention.head_dim)[:, layout.prefix :].mean((1, 2))
    torch.testing.assert_close(scores, rows[:, 3:11], atol=1e-6, rtol=1e-5)


def test_scores_without_rope_do_not_know_where_a_token_stands(make_config):
    torch.manual_seed(0)
    decoder = CogMergePolicy(make_config()).eval().model.decoder
    layer, layout = decoder.backbone.layers[0], Layout(text=3, vision=8, state=1, action=2)
    x = torch.randn(1, layout.length, 32)
    x[:, 3:11] = x[:, 3:4]
    rotary = decoder.backbone.rotary_emb(x, torch.arange(14)[None])
    given = LayerInput(x, layout, layout.mask("coupled"), rotary)
    plain = attention_scores(layer, given, rotate=False)
    torch.testing.assert_close(plain, plain[:, :1].expand(-1, 8))
    assert attention_scores(layer, given, rotate=True).std() > 1e-4


def test_uniform_sample_by_hand():
    four = [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert uniform_sample((2, 4, 4), 8).tolist() == [bool(v) for row in four * 2 for v in row]
    assert uniform_sample((2, 4, 4), 7).nonzero().flatten().tolist() == [0, 16]  # strides 2 and 3 sample 8
    assert uniform_sample((1, 4, 4), 1).nonzero().flatten().tolist() == [0]
    assert not uniform_sample((2, 4, 4), 1).any()


def test_dropped_tokens_are_no_candidates():
    scores = torch.tensor([[0.4, 0.9, 0.1, 0.3]])
    previous = torch.tensor([[0, 2]])
    assert among(previous, scores).tolist() == [
        [pytest.approx(0.4), -torch.inf, pytest.approx(0.1), -torch.inf]
    ]
    assert among(None, scores) is scores


# -- reducers ------------------------------------------------------------------------------------------


def test_fourier_is_scipys_cropped_dct():
    features = torch.randn(1, 6 * 5, 3, dtype=torch.float64)
    weights = fourier(features, (6, 5), (3, 2))
    image = features[0].reshape(6, 5, 3).numpy()
    low = dctn(image, axes=(0, 1), norm="ortho")[:3, :2]
    expected = idctn(low, axes=(0, 1), norm="ortho") * np.sqrt(3 * 2 / (6 * 5))
    np.testing.assert_allclose((weights @ features)[0].numpy(), expected.reshape(6, 3), atol=1e-12)
    constant = torch.full((1, 30, 1), 7.0, dtype=torch.float64)
    torch.testing.assert_close(weights @ constant, constant[:, :6])
    torch.testing.assert_close(fourier(features, (6, 5), (6, 5))[0], torch.eye(30, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(5))
def test_farthest_points_are_within_twice_the_best_radius(seed):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(1, 9, 3, generator=generator)
    unit = torch.nn.functional.normalize(patches[0], dim=-1)
    chords = torch.cdist(unit, unit)

    def radius(chosen):
        return float(chords[list(chosen)].amin(0).max())

    weights = farthest_point(patches, (3, 3), (1, 3))
    chosen = weights[0].argmax(-1).tolist()
    assert chosen == sorted(set(chosen)) and torch.equal(weights.sum(-1), torch.ones(1, 3))
    best = min(radius(c) for c in itertools.combinations(range(9), 3))
    assert radius(chosen) <= 2 * best + 1e-6


def test_a_duplicate_is_not_chosen_before_something_new():
    patches = torch.tensor([[[2.0, 0], [1.0, 0], [1.0, 0], [0, 1.0]]])
    assert farthest_point(patches, (2, 2), (1, 2))[0].argmax(-1).tolist() == [0, 3]
    assert farthest_point(patches[:, :3], (1, 3), (1, 3))[0].argmax(-1).tolist() == [0, 1, 2]


def test_average_pooling_is_the_mean_of_the_cell():
    patches = torch.arange(16.0).reshape(1, 16, 1)
    weights = REDUCERS["average_pool"](patches, (4, 4), (2, 2))
    assert (weights @ patches).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize("name", ["average_pool", "fourier"])
def test_a_matrix_first_made_in_inference_serves_training(name):
    cells = (3, 1)  # of a size that no other test uses: the matrix is made here
    with torch.inference_mode():
        REDUCERS[name](torch.rand(1, 9, 2), (3, 3), cells)
    patches = torch.rand(1, 9, 2, requires_grad=True)
    (REDUCERS[name](patches, (3, 3), cells) @ patches).sum().backward()
    torch.testing.assert_close(patches.grad.sum(), torch.tensor(6.0))


# -- masks ---------------------------------------------------------------------------------------------

LAYOUT = Layout(text=2, vision=2, state=1, action=2)
TABLES = {
    "coupled": ["1000000", "1100000", "1110000", "1111000", "1111100", "1111111", "1111111"],
    "causal": ["1000000", "1100000", "1110000", "1111000", "1111100", "1111110", "1111111"],
    "full": ["1111111"] * 7,
    "modality_mutual": ["1011000", "1111000", "1110000", "1111000", "1111100", "1111111", "1111111"],
    "no_vision_to_vision": ["1000000", "1100000", "1110000", "1101000", "1111100", "1111111", "1111111"],
}


@pytest.mark.parametrize("name", MASKS)
def test_the_truth_table_of_each_mask(name):
    rows = LAYOUT.mask(name).dense[0, 0]
    assert ["".join(str(int(v)) for v in row) for row in rows] == TABLES[name]
    valid = torch.tensor([[True, False, True, True, True, True, True]])
    padded = LAYOUT.mask(name, valid).dense[0, 0]
    assert not padded[:, 1].any()
    assert torch.equal(padded, rows & valid)


@pytest.mark.parametrize("name", MASKS)
def test_the_mask_of_what_is_left_is_the_mask_of_a_shorter_sequence(name):
    shorter = LAYOUT.mask(name).without(1, None)
    assert torch.equal(shorter.dense, Layout(text=2, vision=1, state=1, action=2).mask(name).dense)


@pytest.mark.parametrize("name", MASKS)
def test_who_hears_of_the_instruction_and_of_the_images(make_config, name):
    """Change one token; see which others change after one dense layer."""
    torch.manual_seed(0)
    config = make_config(decoder_layers=1, attention_mask=name, token_pruner="none")
    decoder = CogMergePolicy(config).eval().model.decoder
    x = torch.randn(1, LAYOUT.length, 32)
    for column in range(LAYOUT.length):
        other = x.clone()
        other[:, column] += 1.0
        moved = (decoder(other, LAYOUT) - decoder(x, LAYOUT)).abs().amax(-1)[0] > 1e-6
        expected = [row[column] == "1" or i == column for i, row in enumerate(TABLES[name])]
        assert moved.tolist() == expected

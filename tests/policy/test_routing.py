import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vla.policy.routing import EncoderGate, Film, LfpRouter, keep_counts, masked_mean, select_top_k

# Released CogVLA schedule, 32 layers and 128 vision tokens (LIBERO, two cameras).
PUBLISHED = (128,) * 8 + (108, 103, 97, 92, 86, 80, 73, 67, 60, 54, 47, 41, 35, 30, 24) + (19,) * 9


def test_schedule_is_the_published_table():
    assert keep_counts(32, 128) == PUBLISHED
    assert sum(PUBLISHED) / 32 == pytest.approx(68.5, abs=0.05)


def test_schedule_for_three_cameras_starts_and_ends_as_published():
    counts = keep_counts(32, 192)
    assert (counts[8], counts[-1]) == (162, 28)
    assert sum(counts) / 32 == pytest.approx(102.75, abs=0.05)


@given(st.integers(1, 64), st.integers(1, 300), st.floats(0.05, 1.0))
def test_schedule_never_grows_and_keeps_a_token(layers, tokens, floor):
    counts = keep_counts(layers, tokens, floor)
    assert len(counts) == layers
    assert all(1 <= count <= tokens for count in counts)
    assert list(counts) == sorted(counts, reverse=True)


def test_top_k_gives_ties_to_the_lower_index():
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert select_top_k(scores, 2).tolist() == [[1, 2], [0, 1]]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_top_k_equals_sorting_by_score_then_index(values, data):
    k = data.draw(st.integers(1, len(values)))
    expected = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])
    assert select_top_k(torch.tensor([values], dtype=torch.float32), k)[0].tolist() == expected


def test_film_starts_as_identity_and_follows_the_paper():
    film = Film(3, 2)
    x, t = torch.randn(1, 4, 2), torch.tensor([[1.0, 2.0, 3.0]])
    torch.testing.assert_close(film(x, t), x)
    with torch.no_grad():
        film.out.bias.copy_(torch.tensor([1.0, 0.0, 10.0, 20.0]))  # gamma = (1, 0), beta = (10, 20)
    torch.testing.assert_close(film(x, t), x * torch.tensor([2.0, 1.0]) + torch.tensor([10.0, 20.0]))


def test_router_score_folds_as_the_paper_says():
    """The shift term is constant over tokens: it moves the gate but not the ranking."""
    torch.manual_seed(0)
    router = LfpRouter(8)
    h, u = torch.randn(2, 6, 8), torch.randn(2, 8)
    torch.nn.init.normal_(router.film.out.weight)
    logits, gate = router(h, u)
    gamma, beta = router.film.out(router.film.hidden(u)).chunk(2, dim=-1)
    w = router.score.weight[0]
    folded = h @ (w * (1 + gamma)).unsqueeze(-1)
    shift = (beta @ w + router.score.bias)[:, None]
    torch.testing.assert_close(logits, folded.squeeze(-1) + shift, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gate, 2 * torch.sigmoid(logits))


def test_router_starts_unhalved():
    gate = LfpRouter(16)(torch.randn(1, 5, 16), torch.randn(1, 16))[1]
    assert (gate - 1).abs().max() < 0.2


def test_mean_leaves_padding_out():
    x = torch.tensor([[[1.0], [3.0], [100.0]]])
    valid = torch.tensor([[True, True, False]])
    assert masked_mean(x, valid).item() == 2.0


def test_encoder_gate_mixes_with_weights_that_sum_to_one():
    gate = EncoderGate(4, 2)
    stream = torch.randn(3, 5, 6)
    torch.testing.assert_close(gate([stream, stream], torch.randn(3, 4)), stream)
    low, high = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    mixed = gate([low, high], torch.randn(1, 4))
    assert mixed.min() > 0 and mixed.max() < 1 and mixed.std() < 1e-6

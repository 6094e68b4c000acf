"""Every method against its published formula on dense float64 matrices, and the identities that tie them."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.errors import UserError
from vla.experts.low_rank import LowRank
from vla.experts.merging.dare import drop_and_rescale
from vla.experts.merging.emr import Emr, emr
from vla.experts.merging.least_squares import LEVELS, LeastSquares, least_squares
from vla.experts.merging.magnitude import MagnitudeSurvey, magnitude_threshold
from vla.experts.merging.method import TensorContext
from vla.experts.merging.registry import METHODS, make_method
from vla.experts.merging.ties import ties
from vla.experts.merging.weighted_average import weighted_average
from vla.experts.merging.wudi import Interference, wudi, wudi_exact
from vla.experts.task_masks import signed_update

SHAPES = [(12, 9, 3), (8, 14, 2), (5, 6, 7)]  # m, n, rank: tall, wide, more rank than the matrix has room for


def random_updates(m, n, r, experts=3, seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    return [
        LowRank(torch.randn(m, r, generator=generator) * scale, torch.randn(r, n, generator=generator))
        for _ in range(experts)
    ]


def merge(name, updates, weights=None, seed=0, **options):
    """Merge as the engine does: survey first, then the tensor."""
    method = make_method(name, options)
    survey = method.start_survey(len(updates))
    while survey is not None and not survey.done:
        survey.observe(updates)
        survey.finish_pass()
    names = tuple(f"expert{i}" for i in range(len(updates)))
    return method.merge(
        updates, TensorContext("layer.weight", names, tuple(weights or [1.0] * len(updates)), seed, survey)
    )


def dense64(updates):
    return [update.dense().double().numpy() for update in updates]


def close(actual, expected, tolerance=2e-4):
    torch.testing.assert_close(
        actual.double(), torch.as_tensor(expected).double(), atol=tolerance, rtol=tolerance
    )


def polar64(x):
    """(x xᵀ)^(-1/2) x through eigenvalues: not the way the code goes."""
    values, vectors = np.linalg.eigh(x.T @ x)
    return x @ vectors @ np.diag(values**-0.5) @ vectors.T


IDENTITIES = [
    ("weighted_average", {}),
    ("task_arithmetic", {}),
    ("ties", {"density": 1.0}),
    ("ties", {"density": 1.0, "combine": "sum", "trim": "tensor"}),
    ("dare", {"drop": 0.0}),
    ("dare", {"drop": 0.0, "then": "ties"}),
    ("tsv_m", {}),
    ("knots", {"combine": "sum"}),
    ("knots", {"density": 1.0}),
    ("wudi", {}),
    ("wudi", {"solver": "exact"}),
    ("emr", {}),
    ("least_squares", {}),
    ("least_squares", {"bits": 2}),
]


def test_every_method_promises_or_denies_the_identity():
    assert {name for name, _ in IDENTITIES} | {"iso_c"} == set(METHODS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "options"), IDENTITIES)
def test_one_expert_is_the_identity(name, options, shape):
    update = random_updates(*shape, experts=1)
    close(merge(name, update, **options), update[0].dense(), tolerance=2e-5)


@pytest.mark.parametrize("name", METHODS)
def test_an_expert_that_left_the_tensor_alone_is_no_obstacle(name):
    updates = random_updates(12, 9, 3)
    absent = LowRank.zero((12, 9))
    assert merge(name, [absent, absent]).abs().max() == 0
    merged = merge(name, [*updates, absent])
    assert merged.shape == (12, 9) and merged.isfinite().all() and merged.abs().max() > 0
    if name in ("task_arithmetic", "emr", "iso_c", "knots", "least_squares"):
        close(merged, merge(name, updates))
    if name == "wudi":  # Adam's first steps are lr-sized whatever the gradient: rounding decides them
        close(merged, merge(name, updates), tolerance=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_knots_with_summed_blocks_is_task_arithmetic(shape):
    updates = random_updates(*shape)
    close(merge("knots", updates, combine="sum"), merge("task_arithmetic", updates), tolerance=2e-5)


def test_weighted_average_averages_the_experts_weights():
    updates, weights = random_updates(6, 5, 2), [1.0, 2.0, 5.0]
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(9))
    average = sum(w * (base + u.dense()) for w, u in zip(weights, updates, strict=True)) / 8
    close(base + merge("weighted_average", updates, weights), average, tolerance=1e-6)
    with pytest.raises(UserError, match="sum to zero"):
        weighted_average([base, base], [1.0, -1.0])


def test_ties_worked_by_hand():
    a = torch.tensor([1.0, -2.0, 0.1, 3.0, -1.0])
    b = torch.tensor([2.0, 1.0, -0.2, 1.0, 1.0])
    # last entry cancels: plus is elected; the third is trimmed away in both
    close(ties([a, b], [1, 1], [0.5, 0.5]), [1.5, -2.0, 0.0, 2.0, 1.0])
    close(ties([a, b], [1, 1], [0.5, 0.5], "sum"), [3.0, -2.0, 0.0, 4.0, 1.0])
    # weights enter after the election: b outweighs a in the second entry but does not win it
    close(ties([a, b], [1, 10], [0.5, 0.5], "sum"), [21.0, -2.0, 0.0, 13.0, 10.0])


def test_ties_trims_the_whole_task_vector():
    """Globally the small tensor loses everything; per tensor it keeps its share."""
    large, small = torch.arange(1.0, 9.0).view(2, 4), torch.arange(1.0, 9.0).view(2, 4) / 100
    method = make_method("ties", {"density": 0.5})
    survey = method.start_survey(1)
    while not survey.done:
        for tensor in (large, small):
            survey.observe([LowRank(tensor, torch.eye(4))])
        survey.finish_pass()
    assert survey.thresholds == (1.0,)
    context = TensorContext("small", ("a",), (1.0,), survey=survey)
    assert method.merge([LowRank(small, torch.eye(4))], context).count_nonzero() == 0
    kept = merge("ties", [LowRank(small, torch.eye(4))], density=0.5, trim="tensor")
    close(kept, torch.where(small >= 0.05, small, 0))


@given(
    st.lists(
        st.floats(-1e6, 1e6, width=32) | st.floats(-(2.0**-100), 2.0**-100, width=32), min_size=1, max_size=60
    ),
    st.floats(0.01, 0.99),
    st.integers(1, 5),
)
@settings(max_examples=60)
def test_radix_selection_is_sorting(values, density, parts):
    vector = torch.tensor(values, dtype=torch.float32)
    survey = MagnitudeSurvey(1, density)
    while not survey.done:
        for part in vector.chunk(parts):
            survey.count(0, part)
        survey.finish_pass()
    k = max(1, int(density * len(vector)))
    assert survey.thresholds[0] == vector.abs().sort(descending=True).values[k - 1].item()
    assert magnitude_threshold(vector, density) == survey.thresholds[0]


def test_dare_is_unbiased_and_repeatable_in_any_order():
    ones = torch.ones(400, 500)
    dropped = drop_and_rescale(ones, 0.75, torch.Generator().manual_seed(0))
    assert dropped.unique().tolist() == [0.0, 4.0]
    assert dropped.mean().item() == pytest.approx(1.0, abs=4 * (3 / ones.numel()) ** 0.5)
    updates = random_updates(12, 9, 3)
    first = merge("dare", updates)
    torch.rand(100)  # the global generator plays no part
    assert torch.equal(first, merge("dare", updates))
    assert not torch.equal(first, merge("dare", updates, seed=1))
    context = TensorContext("layer.weight", ("expert2", "expert0"), (1.0, 1.0))
    alone = merge("dare", updates[:1])
    swapped = make_method("dare").merge([LowRank.zero((12, 9)), updates[0]], context)
    assert torch.equal(alone, swapped), "an expert's drops must not depend on its place in the list"


@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_m_is_the_dense_algorithm(shape):
    m, n, r = shape
    updates = random_updates(*shape, experts=2)
    k = min(r, min(m, n) // 2)
    parts = [np.linalg.svd(d, full_matrices=False) for d in dense64(updates)]
    u = polar64(np.hstack([p[0][:, :k] for p in parts]))
    v = polar64(np.vstack([p[2][:k] for p in parts]).T).T
    close(merge("tsv_m", updates), u @ np.diag(np.hstack([p[1][:k] for p in parts])) @ v)


@pytest.mark.parametrize("shape", SHAPES)
def test_knots_with_ties_is_the_dense_algorithm(shape):
    updates = random_updates(*shape)
    n = shape[1]
    u, s, v = np.linalg.svd(np.hstack(dense64(updates)), full_matrices=False)
    rank = int((s > 1e-5 * s[0]).sum())
    blocks = [torch.as_tensor(v[:rank, i * n : (i + 1) * n]) for i in range(3)]
    trimmed = []
    for block in blocks:
        threshold = block.abs().flatten().sort(descending=True).values[int(0.3 * block.numel()) - 1]
        trimmed.append(torch.where(block.abs() >= threshold, block, 0))
    stacked = torch.stack(trimmed)
    agrees = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    merged = (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    close(merge("knots", updates), u[:, :rank] @ np.diag(s[:rank]) @ merged.numpy())


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_flattens_the_spectrum_of_the_sum(shape):
    updates = random_updates(*shape)
    u, s, v = np.linalg.svd(sum(dense64(updates)), full_matrices=False)
    rank = int((s > 1e-5 * s[0]).sum())
    close(merge("iso_c", updates), s[:rank].mean() * u[:, :rank] @ v[:rank], tolerance=1e-3)


def interference_loss(tau, deltas):
    return sum(((tau - d) @ d.T).square().sum() / d.square().sum() for d in deltas)


def test_wudi_follows_the_gradient_of_its_loss():
    updates = random_updates(12, 9, 3)
    deltas = [update.dense().double() for update in updates]
    x = torch.randn(12, 9, generator=torch.Generator().manual_seed(3))
    tau = (sum(deltas) + x.double()).requires_grad_()
    interference_loss(tau, deltas).backward()
    close(Interference.of(updates).gradient(x), tau.grad, tolerance=1e-4)

    tau = sum(deltas).clone().requires_grad_()
    optimizer = torch.optim.Adam([tau], lr=1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        interference_loss(tau, deltas).backward()
        optimizer.step()
    close(wudi(updates, 40, 1e-3), tau.detach(), tolerance=2e-3)
    assert (tau.detach() - sum(deltas)).abs().max() > 0.02, "the steps must be seen"


def test_exact_wudi_is_the_minimum_nearest_to_the_sum():
    updates = random_updates(12, 20, 3)
    deltas = [update.dense().double() for update in updates]
    merged = wudi_exact(updates).double()
    assert interference_loss(merged, deltas) < 1e-8 * interference_loss(sum(deltas), deltas)
    # nearest: the correction lies in the experts' row spaces
    rows = torch.linalg.qr(torch.cat([u.a for u in updates]).double().T)[0]
    correction = merged - sum(deltas)
    close(correction @ rows @ rows.T, correction, tolerance=1e-4)
    # two identical experts: the minimum is the expert itself
    close(wudi_exact([updates[0], updates[0]]), updates[0].dense(), tolerance=1e-4)


def test_least_squares_worked_by_hand():
    """Two that agree share their mean; of two that oppose the larger wins; one far larger is alone."""
    a, b = torch.tensor([[2.0, 3.0, 9.0, 0.0, -4.0]]), torch.tensor([[4.0, -2.0, 1.0, -5.0, -4.0]])
    merged = least_squares([a, b])
    close(merged, [[3.0, 3.0, 9.0, -5.0, -4.0]])
    assert LeastSquares().mask(a, merged).tolist() == [[True, True, True, False, True]]
    assert LeastSquares().mask(b, merged).tolist() == [[True, False, False, True, True]]


@given(st.lists(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=5), min_size=1, max_size=6))
@settings(max_examples=50)
@pytest.mark.parametrize("bits", LEVELS)
def test_least_squares_loses_no_more_than_any_choice_of_levels(bits, entries):
    """Against every choice of levels with the entry that is best for it."""
    method = LeastSquares(bits=bits)
    for values in entries:
        deltas = [torch.tensor([[value]]) for value in values]
        merged = least_squares(deltas, LEVELS[bits])
        lost = 0.0
        for delta in deltas:
            negated = method.negated(delta, merged) if method.signed else None
            lost += (delta - signed_update(merged, method.mask(delta, merged), negated)).item() ** 2
        for chosen in itertools.product(LEVELS[bits], repeat=len(values)):
            squares = sum(c * c for c in chosen)
            along = sum(c * value for c, value in zip(chosen, values, strict=True))
            best = along / squares if squares else 0.0
            possible = sum((value - c * best) ** 2 for c, value in zip(chosen, values, strict=True))
            assert lost <= possible + 1e-4 * (1 + possible)


def test_two_bit_least_squares_worked_by_hand():
    """Levels (1, 2), (-1, 2), (1, -1), (1, 0), (2, 1) of five pairs; d = (a c_a + b c_b) / (c_a² + c_b²)."""
    a = LowRank(torch.tensor([[2.0, 2.0, 3.0, 9.0, -8.0]]), torch.eye(5))
    b = LowRank(torch.tensor([[4.0, -4.0, -2.9, 0.0, -4.5]]), torch.eye(5))
    merged, method = merge("least_squares", [a, b], bits=2), LeastSquares(bits=2)
    close(merged, [[2.0, -2.0, 2.95, 9.0, -4.1]])
    assert method.mask(a.dense(), merged).tolist() == [[True, False, True, True, True]]
    assert method.negated(a.dense(), merged).tolist() == [[False, True, False, False, True]]
    assert method.mask(b.dense(), merged).tolist() == [[True, True, False, False, True]]
    assert method.negated(b.dense(), merged).tolist() == [[True, True, True, False, False]]


def test_only_one_and_two_bits_are_known():
    with pytest.raises(UserError, match="bits is 3; it must be 1 or 2"):
        LeastSquares(bits=3)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_second_bit_loses_less(shape):
    """What masks of one and of two bits leave of all updates, in squares over all entries."""
    updates = random_updates(*shape, experts=4)
    lost = {}
    for bits in LEVELS:
        method, merged = LeastSquares(bits=bits), merge("least_squares", updates, bits=bits)
        lost[bits] = 0.0
        for delta in (update.dense() for update in updates):
            negated = method.negated(delta, merged) if method.signed else None
            lost[bits] += (delta - signed_update(merged, method.mask(delta, merged), negated)).square().sum()
    total = sum(update.dense().square().sum() for update in updates)
    assert 0 < lost[2] < 0.3 * lost[1] < 0.1 * total


def test_least_squares_in_parts_is_least_squares_at_once(monkeypatch):
    updates = [update.dense() for update in random_updates(12, 9, 3)]
    whole = least_squares(updates)
    monkeypatch.setattr("vla.experts.merging.least_squares._ENTRIES_AT_A_TIME", 20)
    assert torch.equal(least_squares(updates), whole)
    assert torch.equal(least_squares([update.T.contiguous().T for update in updates]), whole)


def test_emr_worked_by_hand():
    a, b, c = torch.tensor([[1.0, -2.0, 3.0], [2.0, 1.0, -1.0], [-1.0, 0.5, 2.0]])
    merged = emr([a, b, c])
    assert merged.tolist() == [2.0, -2.0, 3.0]
    masks = [Emr().mask(d, merged).tolist() for d in (a, b, c)]
    assert masks == [[True, True, True], [True, False, False], [False, False, True]]


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("tie", {}, r"no merging method 'tie'\. Did you mean 'ties'\?"),
        ("ties", {"densety": 1}, r"no option 'densety'\. Did you mean 'density'\?"),
        ("ties", {"density": "high"}, "'high'; a float is needed"),
        ("wudi", {"steps": True}, "True; a int is needed"),
        ("ties", {"density": 0}, "density is 0; it must be above 0"),
        ("dare", {"drop": 1.0}, "below 1"),
        ("knots", {"combine": "median"}, "choose from ties, sum"),
    ],
)
def test_wrong_words_are_refused(name, options, sentence):
    with pytest.raises(UserError, match=sentence):
        make_method(name, options)

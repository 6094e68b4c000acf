"""K2 against its formula in fp64, against the policy's own router, and on ties, extremes and NaN."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vla.errors import UserError
from vla.kernels.film_route_select import (
    SCORE_KERNEL,
    SELECT_KERNEL,
    dispatch,
    film_route_select,
    fold_router,
    reference,
)
from vla.policy.routing import LfpRouter, select_top_k

CASES = [(1, 1, 3, 1), (2, 7, 5, 3), (3, 33, 20, 32), (1, 65, 48, 65)]  # B, V, D, k
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN, INF = float("nan"), float("inf")


def arguments(case, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, tokens, width, k = case
    x = torch.randn(batch, tokens, width, generator=generator).to(dtype)
    work = torch.promote_types(dtype, torch.float32)
    direction = torch.randn(batch, width, generator=generator).to(work) / width**0.5
    return x, direction, torch.randn(batch, generator=generator).to(work), k


def through_op(x, direction, offset, k, gate_scale, eps, span=None):
    first, end = span or (0, x.shape[1])
    return torch.ops.cogmerge.film_route_select(x, direction, offset, k, gate_scale, eps, first, end)


def tokens_with_scores(scores):
    """Two-channel tokens (s, sqrt(2 - s^2)): rstd is 1, so under direction (1, 0) the score is s."""
    return torch.stack([scores, (2 - scores.square()).sqrt()], dim=-1)


def test_fold_is_the_routers_score():
    torch.manual_seed(0)
    router, norm = LfpRouter(8), nn.RMSNorm(8, eps=1e-6)
    for parameter in (*router.parameters(), *norm.parameters()):
        nn.init.normal_(parameter)
    x, u = torch.randn(2, 6, 8), torch.randn(2, 8)
    gamma, beta = router.film.out(router.film.hidden(u)).chunk(2, dim=-1)
    direction, offset = fold_router(router.score.weight[0], router.score.bias, norm.weight, gamma, beta)
    rstd = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    logits = router(norm(x), u)[0]
    torch.testing.assert_close((x * rstd) @ direction[..., None] + offset[:, None, None], logits[..., None])


@pytest.mark.parametrize("k", [1, 9, 40])
def test_selects_what_the_policys_router_selects(k):
    """Tokens, gates and every gradient equal those of the module chain that the policy runs."""
    torch.manual_seed(k)
    router, norm = LfpRouter(16), nn.RMSNorm(16, eps=1e-6)
    parameters = [*router.parameters(), norm.weight]
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.5)
    x, u = torch.randn(3, 40, 16, requires_grad=True), torch.randn(3, 16)
    logits, gates = router(norm(x), u)
    kept = select_top_k(logits, k)
    want = gates.gather(1, kept)

    gamma, beta = router.film.out(router.film.hidden(u)).chunk(2, dim=-1)
    folded = fold_router(router.score.weight[0], router.score.bias, norm.weight, gamma, beta)
    for run in (film_route_select, through_op):
        index, got, _ = run(x, *folded, k, 2.0, 1e-6)
        assert torch.equal(index, kept)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
        upstream = torch.randn(3, k)
        ours = torch.autograd.grad(got, [x, *parameters], upstream, retain_graph=True)
        theirs = torch.autograd.grad(want, [x, *parameters], upstream, retain_graph=True)
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_torch_path_and_custom_op_equal_the_reference(case, dtype, close_to_reference):
    inputs = arguments(case, dtype)
    want = reference(*inputs)
    for run in (film_route_select, through_op):
        index, *got = run(*inputs, 1.0, 1e-6)
        assert torch.equal(index, want[0])
        close_to_reference(got, want[1:], min(dtype, torch.float32, key=lambda d: torch.finfo(d).eps))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_triton_path(case, dtype, triton_path, close_to_reference):
    inputs = arguments(case, dtype)
    index, gate, rstd = reference(*inputs, 2.0)
    upstream = (None, torch.linspace(-1, 1, gate.numel()).reshape(gate.shape), None)
    outputs, gradients = triton_path("film_route_select", *inputs, 2.0, upstream=upstream)
    assert torch.equal(outputs[0].cpu(), index)
    close_to_reference(outputs[1:], (gate, rstd), torch.float32)
    wide = [t.double().requires_grad_() for t in inputs[:3]]
    want = torch.autograd.grad(reference(*wide, inputs[3], 2.0)[1], wide, upstream[1].double())
    close_to_reference(gradients, want, dtype, factor=5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("case", "span"), [(CASES[1], (2, 6)), (CASES[2], (0, 33)), ((2, 40, 6, 4), (3, 38))]
)
def test_only_candidates_compete_and_all_others_stay(case, span, dtype, triton_path, close_to_reference):
    """Against the same routing of the candidates alone, put back between the others with gate 1."""
    x, direction, offset, k = arguments(case, dtype)
    k, (first, end) = min(k, span[1] - span[0]), span
    alone, gates, _ = reference(x[:, first:end], direction, offset, k, 2.0)
    position = torch.arange(case[1]).expand(len(x), -1)
    index = torch.cat([position[:, :first], alone + first, position[:, end:]], 1)
    ones = torch.ones(index.shape, dtype=torch.float64)
    gate = torch.cat([ones[:, :first], gates, ones[:, first + k :]], 1)
    rstd = reference(x, direction, offset, k)[2]
    upstream = (None, torch.linspace(-1, 1, gate.numel()).reshape(gate.shape), None)
    wide = [t.double().requires_grad_() for t in (x, direction, offset)]
    want = torch.autograd.grad(
        reference(wide[0][:, first:end], *wide[1:], k, 2.0)[1],
        wide,
        upstream[1].double()[:, first : first + k],
    )
    assert torch.equal(reference(x, direction, offset, k, 2.0, span=span)[0], index)
    outputs, gradients = triton_path(
        "film_route_select", x, direction, offset, k, 2.0, span=span, upstream=upstream
    )
    for got in (outputs, film_route_select(x, direction, offset, k, 2.0, span=span)):
        assert torch.equal(got[0].cpu(), index)
        close_to_reference(got[1:], (gate, rstd), torch.float32)
    close_to_reference(gradients, want, dtype, factor=5)


def test_a_nan_among_the_candidates_costs_no_other_token_its_place(triton_path):
    scores = torch.tensor([[0.5, NAN, NAN, NAN, -0.5, 0.25]])
    inputs = (tokens_with_scores(scores), torch.tensor([[1.0, 0.0]]), torch.zeros(1), 2, 1.0, 0.0)
    want = [0, 1, 2, 5]
    assert film_route_select(*inputs, span=(1, 5))[0][0].tolist() == want
    assert triton_path("film_route_select", *inputs, span=(1, 5))[0][0][0].tolist() == want


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_ties_signed_zeros_and_nan_rank_as_the_policy_ranks_them(k, triton_path):
    scores = [
        [0.0, -0.0, 0.0, -0.0, 0.0],
        [0.25, 0.75, 0.75, 0.75, -0.5],
        [NAN, 0.25, 1.0, NAN, -1.0],
        [-0.25, -0.75, -0.5, -0.75, -0.125],
        [NAN, NAN, NAN, NAN, NAN],
    ]
    scores = torch.tensor(scores)
    inputs = (
        tokens_with_scores(scores),
        torch.tensor([[1.0, 0.0]]).repeat(5, 1),
        torch.zeros(5),
        k,
        1.0,
        0.0,
    )
    want = select_top_k(scores, k)
    assert torch.equal(film_route_select(*inputs)[0], want)
    assert torch.equal(reference(*inputs)[0], want)
    assert torch.equal(triton_path("film_route_select", *inputs)[0][0].cpu(), want)


def test_infinite_scores_rank_between_numbers_and_nan(triton_path):
    x = torch.ones(1, 5, 1)
    x[0, :, 0] = torch.tensor([1.0, -1.0, NAN, 1.0, -1.0])
    inputs = (x, torch.tensor([[INF]]), torch.zeros(1), 3, 1.0, 0.0)
    want = torch.tensor([[0, 2, 3]])
    assert torch.equal(film_route_select(*inputs)[0], want)
    assert torch.equal(triton_path("film_route_select", *inputs)[0][0].cpu(), want)


@settings(max_examples=12)
@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=70), share=st.floats(0, 1))
def test_interpreted_selection_equals_sorting_by_score_then_index(interpreter, values, share):
    k = max(1, round(share * len(values)))
    x = tokens_with_scores(torch.tensor(values)[None] / 4)
    expected = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])
    inputs = (x, torch.tensor([[1.0, 0.0]]), torch.zeros(1), k, 1.0, 0.0)
    assert interpreter("film_route_select", *inputs)[0][0][0].tolist() == expected
    assert film_route_select(*inputs)[0][0].tolist() == expected


def test_reads_a_slice_of_a_sequence_in_place(triton_path):
    sequence = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    inputs = (sequence[:, 2:7], torch.ones(2, 6), torch.zeros(2), 2)
    want = reference(*inputs)
    outputs, _ = triton_path("film_route_select", *inputs)
    assert torch.equal(outputs[0].cpu(), want[0])
    torch.testing.assert_close(outputs[2].cpu().double(), want[2])


def test_hand_written_backward_passes_gradcheck():
    *inputs, k = arguments((2, 6, 4, 3), torch.float64)
    inputs = [t.requires_grad_() for t in inputs]
    for run, span in itertools.product((through_op, film_route_select, reference), [(0, 6), (1, 5)]):

        def gates(*t, run=run, span=span):
            return run(*t, k, 2.0, 1e-3, span)[1]

        assert torch.autograd.gradcheck(gates, inputs)


def test_custom_op_is_registered_properly():
    *inputs, k = arguments((2, 6, 4, 3), torch.float32)
    inputs = [t.requires_grad_() for t in inputs]
    # The fourth check of opcheck adds outputs to the first, which fails for integers; the test of compilation
    # below, with dynamic shapes, stands in for it.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.cogmerge.film_route_select.default
    torch.library.opcheck(op, (*inputs, k, 2.0, 1e-6, 1, 5), test_utils=checks)


def test_compiles_without_a_graph_break():
    *inputs, k = arguments((2, 6, 4, 3), torch.float32)
    inputs = [t.requires_grad_() for t in inputs]

    def run(*inputs):
        index, gate, _ = torch.ops.cogmerge.film_route_select(*inputs, k, 2.0, 1e-6, 1, 5)
        plain, _, rstd = film_route_select(*inputs, k, span=(1, 5))
        return (gate.square() * (index + plain)).sum() + rstd.detach().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    want, got = run(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))


def test_compiled_for_sm90(compile_for_h200):
    pointers = {"x": "*bf16"} | dict.fromkeys(["direction", "offset", "score", "rstd", "gate"], "*fp32")
    sizes = dict.fromkeys(["x_sample", "x_token", "tokens", "first", "end", "width", "k"], "i32")
    types = pointers | sizes | {"index": "*i64", "eps": "fp32", "gate_scale": "fp32"}
    assert compile_for_h200(SCORE_KERNEL, types, {"ROWS": 4, "BLOCK": 1024})
    assert compile_for_h200(SELECT_KERNEL, types, {"TOKENS": 128, "RIVALS": 32})


def test_dispatch_refuses_what_one_program_cannot_rank():
    assert "1025 tokens exceed" in dispatch(torch.zeros(1, 1025, 1)).reason
    assert "channels exceed" in dispatch(torch.zeros(1, 1, 20000)).reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(7, 5)}, "must be"),
        ({1: torch.zeros(5)}, "must be"),
        ({2: torch.zeros(3)}, "must be"),
        ({3: 0}, "cannot keep 0 of 7"),
        ({3: 8}, "cannot keep 8 of 7"),
        ({6: (2, 4)}, "cannot keep 3 of 2"),
        ({6: (4, 8)}, "candidates 4 to 8 do not lie in 7 tokens"),
        ({6: (4, 4)}, "candidates 4 to 4"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(change, message):
    inputs = [*arguments((2, 7, 5, 3), torch.float32), 1.0, 1e-6, (0, 7)]
    for index, value in change.items():
        inputs[index] = value
    with pytest.raises(UserError, match=message):
        film_route_select(*inputs)

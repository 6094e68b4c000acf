"""K3, gather and scatter around a routed layer: each against its formula in fp64, and together."""

import pytest
import torch
from torch import nn

from vla.errors import UserError
from vla.kernels import scatter_residual as scatter_file
from vla.kernels import select_gather_norm as gather_file
from vla.kernels.film_route_select import fold_router
from vla.kernels.scatter_residual import scatter_residual, scatter_residual_
from vla.kernels.select_gather_norm import select_gather_norm
from vla.policy.routing import LfpRouter, select_top_k

CASES = [(1, 1, 2, 1), (2, 9, 5, 4), (1, 17, 33, 17)]  # B, V, D, k
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = torch.ops.cogmerge


def gather_arguments(case, dtype, gated=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, tokens, width, k = case
    x = torch.randn(batch, tokens, width, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(tokens, generator=generator)[:k].sort().values for _ in range(batch)])
    work = torch.promote_types(dtype, torch.float32)
    rstd = (x.to(work).square().mean(-1) + 1e-6).rsqrt()
    weight = torch.randn(width, generator=generator).to(dtype)
    return [x, index, rstd, weight, torch.rand(batch, k, generator=generator).to(work) if gated else None]


def scatter_arguments(case, dtype, gated=True, seed=0):
    x, index, _, _, gate = gather_arguments(case, dtype, gated, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    rows = (*index.shape, x.shape[-1])
    return [x, index, *torch.randn(2, *rows, generator=generator).to(dtype), gate]


def with_gradients(function, inputs, upstream):
    """Outputs and gradients of `function` in fp64; `inputs` are the tensors it is differentiated by."""
    inputs = [t.double().requires_grad_() for t in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return outputs, torch.autograd.grad(outputs, inputs, [g.double() for g in upstream])


@pytest.mark.parametrize("gated", [True, False])
def test_gather_and_scatter_by_hand(gated):
    x = torch.tensor([[[1.0, 1.0], [3.0, 4.0], [2.0, -2.0]]])
    index, gate = torch.tensor([[0, 2]]), torch.tensor([[0.5, 2.0]]) if gated else None
    rstd = x.square().mean(-1).rsqrt()
    chosen, y = select_gather_norm(x, index, rstd, torch.tensor([1.0, 10.0]), gate)
    assert chosen.tolist() == [[[1.0, 1.0], [2.0, -2.0]]]
    torch.testing.assert_close(
        y, torch.tensor([[[0.5, 5.0], [2.0, -20.0]] if gated else [[1, 10.0], [1, -10]]])
    )
    update = torch.tensor([[[2.0, 4.0], [1.0, 1.0]]])
    out = scatter_residual(x, index, chosen, update, gate)
    kept = [[2.0, 3.0], [4.0, 0.0]] if gated else [[3.0, 5.0], [3.0, -1.0]]
    assert out.tolist() == [[kept[0], [3.0, 4.0], kept[1]]]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_torch_paths_and_custom_ops_equal_the_references(case, dtype, gated, close_to_reference):
    inputs = gather_arguments(case, dtype, gated)
    want = gather_file.reference(*inputs[:2], *inputs[3:])
    # eps 1e-6 stands in both: the reference computes its own statistic.
    close_to_reference(select_gather_norm(*inputs), want, dtype)
    close_to_reference(OPS.select_gather_norm(*inputs), want, dtype)
    inputs = scatter_arguments(case, dtype, gated)
    want = [scatter_file.reference(*inputs)]
    close_to_reference([scatter_residual(*inputs)], want, dtype)
    close_to_reference([OPS.scatter_residual(*inputs)], want, dtype)
    close_to_reference([scatter_residual_(inputs[0].clone(), *inputs[1:])], want, dtype)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES[1:])
def test_triton_paths(case, dtype, gated, triton_path, close_to_reference):
    x, index, rstd, weight, gate = gather_arguments(case, dtype, gated)
    upstream = gather_arguments((case[0], case[3], *case[2:]), dtype, seed=3)[0]
    upstream = (upstream, upstream.flip(1))
    got, gradients = triton_path("select_gather_norm", x, index, rstd, weight, gate, upstream=upstream)
    gates = [gate] if gated else []
    want, want_gradients = with_gradients(
        lambda x, w, *g: gather_file.reference(x, index, w, *g), [x, weight, *gates], upstream
    )
    close_to_reference(got, want, dtype)
    assert gradients[1] is None  # rstd is a statistic of x, whose gradient x carries
    close_to_reference([gradients[0], *gradients[2:]], want_gradients, dtype, factor=3)

    x, index, residual, update, gate = scatter_arguments(case, dtype, gated)
    upstream = (x.flip(1),)
    got, gradients = triton_path("scatter_residual", x, index, residual, update, gate, upstream=upstream)
    want, want_gradients = with_gradients(
        lambda x, r, u, *g: scatter_file.reference(x, index, r, u, *g),
        [x, residual, update, *gates],
        upstream,
    )
    close_to_reference(got, want, dtype)
    close_to_reference(gradients, want_gradients, dtype, factor=3)


def test_an_update_narrower_than_the_stream_is_what_autocast_leaves(triton_path, close_to_reference):
    x, index, residual, update, gate = scatter_arguments((2, 9, 5, 4), torch.float32)
    update = update.bfloat16()
    want = [scatter_file.reference(x, index, residual, update, gate)]
    upstream = (x.flip(1),)
    got, gradients = triton_path("scatter_residual", x, index, residual, update, gate, upstream=upstream)
    assert got[0].dtype == torch.float32 and gradients[2].dtype == torch.bfloat16
    close_to_reference(got, want, torch.float32)
    close_to_reference([scatter_residual(x, index, residual, update, gate)], want, torch.float32)


def test_hand_written_backwards_pass_gradcheck():
    x, index, _, weight, gate = gather_arguments((2, 5, 4, 3), torch.float64)
    inputs = [t.requires_grad_() for t in (x, weight, gate)]
    for run in (OPS.select_gather_norm, select_gather_norm):

        def gather(x, weight, gate, run=run):
            rstd = (x.detach().square().mean(-1) + 1e-6).rsqrt()
            return run(x, index, rstd, weight, gate)

        assert torch.autograd.gradcheck(gather, inputs)
    x, index, residual, update, gate = scatter_arguments((2, 5, 4, 3), torch.float64)
    inputs = [t.requires_grad_() for t in (x, residual, update, gate)]
    for run in (OPS.scatter_residual, scatter_residual):
        assert torch.autograd.gradcheck(lambda x, r, u, g, run=run: run(x, index, r, u, g), inputs)


def test_custom_ops_are_registered_properly():
    x, index, rstd, weight, gate = gather_arguments((2, 5, 4, 3), torch.float32)
    inputs = (x.requires_grad_(), index, rstd, weight.requires_grad_(), gate.requires_grad_())
    torch.library.opcheck(OPS.select_gather_norm.default, inputs)
    inputs = scatter_arguments((2, 5, 4, 3), torch.float32)
    torch.library.opcheck(OPS.scatter_residual_.default, inputs)
    x, index, residual, update, _ = inputs
    inputs = (x.requires_grad_(), index, residual.requires_grad_(), update.requires_grad_(), None)
    torch.library.opcheck(OPS.scatter_residual.default, inputs)


def routed_layer(x, u, router, norm, mlp, k):
    """An attention-free routed layer as the policy writes it: rank, gather, gate, compute, scatter."""
    logits, gates = router(norm(x), u)
    kept = select_top_k(logits, k)
    wide = kept[..., None].expand(-1, -1, x.shape[-1])
    chosen, gate = x.gather(1, wide), gates.gather(1, kept)[..., None]
    return x.scatter(1, wide, chosen + gate * mlp(norm(chosen) * gate))


def folded_layer(x, u, router, norm, mlp, k):
    gamma, beta = router.film.out(router.film.hidden(u)).chunk(2, dim=-1)
    folded = fold_router(router.score.weight[0], router.score.bias, norm.weight, gamma, beta)
    index, gate, rstd = OPS.film_route_select(x, *folded, k, 2.0, norm.eps, 0, x.shape[1])
    chosen, y = OPS.select_gather_norm(x, index, rstd, norm.weight, gate)
    return OPS.scatter_residual(x, index, chosen, mlp(y), gate)


def test_the_three_ops_make_the_policys_routed_layer():
    """Values and the gradients of tokens, router, FiLM, norm and MLP, eager and compiled in one graph."""
    torch.manual_seed(0)
    router, norm, mlp = LfpRouter(8), nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 8)
    parameters = [*router.parameters(), norm.weight, *mlp.parameters()]
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.5)
    x, u = torch.randn(2, 11, 8, requires_grad=True), torch.randn(2, 8)
    want = routed_layer(x, u, router, norm, mlp, 4)
    compiled = torch.compile(folded_layer, fullgraph=True, backend="aot_eager")
    upstream = torch.randn_like(want)
    theirs = torch.autograd.grad(want, [x, *parameters], upstream)
    for run in (folded_layer, compiled):
        got = run(x, u, router, norm, mlp, 4)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        ours = torch.autograd.grad(got, [x, *parameters], upstream)
        torch.testing.assert_close(ours, theirs, atol=5e-4, rtol=1e-4)


def test_a_token_that_is_not_kept_changes_nothing_but_itself():
    x, index, residual, update, gate = scatter_arguments((2, 9, 5, 4), torch.float32)
    skipped = torch.ones(2, 9, dtype=torch.bool).scatter(1, index, False)
    out = scatter_residual(x, index, residual, update, gate)
    assert torch.equal(out[skipped], x[skipped])
    x[~skipped] = torch.nan
    assert torch.equal(scatter_residual(x, index, residual, update, gate), out)


def test_in_place_writes_into_a_slice_of_the_sequence(triton_path):
    x, index, residual, update, gate = scatter_arguments((2, 9, 5, 4), torch.float32)
    sequence = torch.cat([x[:, :2] + 1, x, x[:, :3] - 1], dim=1)
    want = scatter_residual(x, index, residual, update, gate)
    got = triton_path("scatter_residual_", sequence[:, 2:11], index, residual, update, gate)[0][0].cpu()
    torch.testing.assert_close(got, want)
    scatter_residual_(sequence[:, 2:11], index, residual, update, gate)
    torch.testing.assert_close(sequence, torch.cat([x[:, :2] + 1, want, x[:, :3] - 1], dim=1))


def test_in_place_refuses_to_lose_a_gradient():
    x, index, residual, update, gate = scatter_arguments((2, 9, 5, 4), torch.float32)
    with pytest.raises(UserError, match=r"no gradient; use scatter_residual"):
        scatter_residual_(x, index, residual, update.requires_grad_(), gate)
    with torch.no_grad():
        scatter_residual_(x, index, residual, update, gate)


def test_compiled_for_sm90(compile_for_h200):
    tokens = dict.fromkeys(["x", "chosen", "y", "weight", "residual", "update"], "*bf16")
    types = tokens | {"index": "*i64", "rstd": "*fp32", "gate": "*fp32"}
    types |= dict.fromkeys(["x_sample", "x_token", "tokens", "k", "width"], "i32")
    for kernel in (gather_file.GATHER_KERNEL, scatter_file.SCATTER_KERNEL):
        names = kernel.jit().arg_names
        mine = {name: kind for name, kind in types.items() if name in names}
        assert compile_for_h200(kernel, mine, {"GATE": True, "BLOCK": 1024})


@pytest.mark.parametrize(
    ("run", "change", "message"),
    [
        (select_gather_norm, {1: torch.zeros(2, 4)}, "int64"),
        (select_gather_norm, {2: torch.zeros(2, 4)}, r"rstd has shape \(2, 4\), not \(2, 9\)"),
        (select_gather_norm, {3: torch.zeros(4)}, "weight has shape"),
        (scatter_residual, {1: torch.zeros(3, 4, dtype=torch.int64)}, "must be"),
        (scatter_residual, {3: torch.zeros(2, 3, 5)}, "update has shape"),
        (scatter_residual, {2: torch.zeros(2, 4, 5).half()}, "must be one"),
        (scatter_residual, {4: torch.zeros(2)}, "gate has shape"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(run, change, message):
    make = gather_arguments if run is select_gather_norm else scatter_arguments
    inputs = make((2, 9, 5, 4), torch.float32)
    for index, value in change.items():
        inputs[index] = value
    with pytest.raises(UserError, match=message):
        run(*inputs)

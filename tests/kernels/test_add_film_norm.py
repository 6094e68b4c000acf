"""K1 against its formula in fp64: every path, every variant, odd shapes."""

import itertools

import pytest
import torch
from torch import nn

from vla.errors import UserError
from vla.kernels.add_film_norm import BACKWARD_KERNEL, FORWARD_KERNEL, add_film_norm, reference

SHAPES = [(1, 1, 1), (2, 3, 5), (3, 17, 33), (1, 9, 64)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NORMS = ["rms", "layer"]


def arguments(shape, dtype, film=True, affine=True, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, _, width = shape

    def random(*size):
        return torch.randn(size, generator=generator).to(dtype)

    condition = [random(batch, width), random(batch, width)] if film else [None, None]
    return [
        random(*shape),
        random(*shape),
        *condition,
        random(width) if affine else None,
        random(width) if bias else None,
    ]


def expected(inputs, upstream, norm):
    """Outputs and gradients of the reference, by autograd in fp64."""
    wide = [None if x is None else x.double().requires_grad_() for x in inputs]
    outputs = reference(*wide, norm)
    gradients = torch.autograd.grad(
        outputs, [x for x in wide if x is not None], [g.double() for g in upstream], allow_unused=True
    )
    return outputs, gradients


def test_hand_worked_rows():
    x, a = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[2.0, 2.0]]])
    gamma, beta = torch.tensor([[0.0, 0.5]]), torch.tensor([[1.0, -2.0]])
    h, y = add_film_norm(x, a, gamma, beta, torch.tensor([2.0, 1.0]), norm="rms", eps=0.0)
    assert h.tolist() == [[[4.0, 4.0]]]  # (3, 4) * (1, 1.5) + (1, -2)
    torch.testing.assert_close(y, torch.tensor([[[2.0, 1.0]]]))
    _, y = add_film_norm(x, a, norm="layer", eps=0.0)
    torch.testing.assert_close(y, torch.tensor([[[-1.0, 1.0]]]))


def test_agrees_with_the_modules_that_the_policy_uses():
    from vla.policy.routing import Film

    torch.manual_seed(0)
    film, norm = Film(6, 8), nn.LayerNorm(8)
    for parameter in (*film.parameters(), *norm.parameters()):
        nn.init.normal_(parameter)
    x, a, condition = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 6)
    gamma, beta = film.out(condition).chunk(2, dim=-1)
    h, y = add_film_norm(x, a, gamma, beta, norm.weight, norm.bias, "layer", norm.eps)
    torch.testing.assert_close(h, film(x + a, condition))
    torch.testing.assert_close(y, norm(film(x + a, condition)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_path_and_custom_op_equal_the_reference(shape, dtype, norm, close_to_reference):
    inputs = arguments(shape, dtype, bias=True)
    want = reference(*inputs, norm)
    close_to_reference(add_film_norm(*inputs, norm, path="torch"), want, dtype)
    op = torch.ops.cogmerge.add_film_norm(*inputs, norm == "layer", 1e-6)
    close_to_reference(op[:2], want, dtype)


# Forward and backward at once; half precision is compared loosely where a sum over rows cancels.
@pytest.mark.parametrize(
    ("shape", "dtype", "norm", "film", "affine", "bias"),
    [
        *[(shape, torch.float32, norm, True, True, True) for shape in SHAPES[1:] for norm in NORMS],
        *[
            ((2, 3, 5), torch.float32, norm, *variant)
            for norm in NORMS
            for variant in [(False, False, False), (False, True, False), (True, False, True)]
        ],
        *[((2, 5, 24), dtype, norm, True, True, False) for dtype in DTYPES[1:] for norm in NORMS],
    ],
)
def test_triton_path(shape, dtype, norm, film, affine, bias, triton_path, close_to_reference):
    inputs = arguments(shape, dtype, film, affine, bias)
    upstream = arguments(shape, dtype, seed=1)[:2]
    outputs, gradients = triton_path("add_film_norm", *inputs, norm, upstream=upstream)
    want, want_gradients = expected(inputs, upstream, norm)
    close_to_reference(outputs, want, dtype)
    close_to_reference(gradients, want_gradients, dtype, factor=2)


def test_a_layers_output_may_be_narrower_than_the_stream(triton_path, close_to_reference):
    """As under autocast: the stream is fp32, what a linear layer returned is bf16."""
    inputs = arguments((2, 5, 24), torch.float32, bias=True)
    inputs[1] = inputs[1].bfloat16()
    upstream = arguments((2, 5, 24), torch.float32, seed=1)[:2]
    want, want_gradients = expected(inputs, upstream, "layer")
    outputs, gradients = triton_path("add_film_norm", *inputs, "layer", upstream=upstream)
    assert [t.dtype for t in (*outputs, *gradients[:2])] == [torch.float32] * 3 + [torch.bfloat16]
    close_to_reference(outputs, want, torch.float32)
    close_to_reference(add_film_norm(*inputs, "layer"), want, torch.float32)
    close_to_reference(gradients[:1], want_gradients[:1], torch.float32, factor=2)
    close_to_reference(gradients[1:2], want_gradients[1:2], torch.bfloat16)


@pytest.mark.parametrize(
    ("norm", "film", "affine"), list(itertools.product(NORMS, [True, False], [True, False]))
)
def test_hand_written_backward_passes_gradcheck(norm, film, affine):
    inputs = arguments((2, 3, 4), torch.float64, film, affine, bias=affine)
    inputs = [None if x is None else x.requires_grad_() for x in inputs]

    def run(*inputs):
        return torch.ops.cogmerge.add_film_norm(*inputs, norm == "layer", 1e-3)[:2]

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradcheck(lambda *inputs: reference(*inputs, norm, 1e-3), inputs)


def test_custom_op_is_registered_properly():
    inputs = [x.requires_grad_() for x in arguments((2, 3, 4), torch.float32, bias=True)]
    torch.library.opcheck(torch.ops.cogmerge.add_film_norm.default, (*inputs, True, 1e-6))
    sparse = arguments((2, 3, 4), torch.float32, film=False, affine=False)
    outputs = torch.ops.cogmerge.add_film_norm(*sparse, False, 1e-6)
    backward = (*sparse[:2], *sparse[:2], None, None, outputs[0], outputs[2], False, False)
    torch.library.opcheck(torch.ops.cogmerge.add_film_norm_backward.default, backward)


def test_compiles_without_a_graph_break():
    inputs = [x.requires_grad_() for x in arguments((2, 3, 4), torch.float32, bias=True)]

    def run(*inputs):
        h, y, _ = torch.ops.cogmerge.add_film_norm(*inputs, True, 1e-6)
        plain = add_film_norm(*inputs, "layer")
        return (h + y).square().sum() + (plain[0] * plain[1]).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want, got = run(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))


def test_inputs_need_not_be_contiguous():
    inputs = arguments((2, 6, 5), torch.float32)
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    inputs[2] = inputs[2][:1].expand(2, -1)
    inputs[3] = inputs[3][:1].expand(2, -1)
    h, y, _ = torch.ops.cogmerge.add_film_norm(*inputs, False, 1e-6)
    torch.testing.assert_close((h, y), add_film_norm(*inputs, path="torch"))


def test_nan_shows():
    inputs = arguments((1, 2, 4), torch.float32)
    inputs[0][0, 1, 2] = torch.nan
    _, y = add_film_norm(*inputs)
    assert y[0, 1].isnan().all() and y[0, 0].isfinite().all()


@pytest.mark.parametrize("centered", [True, False])
def test_compiled_for_sm90(centered, compile_for_h200):
    switches = {"FILM": True, "WEIGHT": True, "CENTERED": centered, "BLOCK": 1024}
    pointers = dict.fromkeys(["x", "a", "gamma", "beta", "weight", "bias", "h", "y"], "*bf16")
    sizes = {"rows": "i32", "per_sample": "i32", "width": "i32", "eps": "fp32", "stats": "*fp32"}
    assert compile_for_h200(FORWARD_KERNEL, pointers | sizes, switches | {"BIAS": True, "ROWS": 4})
    pointers = dict.fromkeys(["dh", "dy", "x", "a", "gamma", "weight", "h", "ds"], "*bf16")
    sizes = {"per_sample": "i32", "width": "i32", "stats": "*fp32", "partial": "*fp32"}
    assert compile_for_h200(BACKWARD_KERNEL, pointers | sizes, switches | {"ROWS": 16})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 4)}, "one shape"),
        ({1: torch.zeros(2, 3, 5)}, "must have one shape"),
        ({3: None}, "together"),
        ({2: torch.zeros(4), 3: torch.zeros(4)}, r"gamma has shape \(4,\), not \(2, 4\)"),
        ({4: torch.zeros(5)}, "weight has shape"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(change, message):
    inputs = arguments((2, 3, 4), torch.float32)
    for index, value in change.items():
        inputs[index] = value
    with pytest.raises(UserError, match=message):
        add_film_norm(*inputs)


def test_unknown_norm_is_refused():
    with pytest.raises(UserError, match="no norm 'batch'"):
        add_film_norm(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), norm="batch")

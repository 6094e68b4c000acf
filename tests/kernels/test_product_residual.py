"""K4, output projection with its residual, against fp64 and against the MLP of transformers' Llama."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from vla.errors import UserError
from vla.kernels.gated_product import gated_product
from vla.kernels.product_residual import PRODUCT_KERNEL, dispatch, product_residual, reference

# shape of x, D
CASES = [((1, 1, 1), 1), ((2, 9, 24), 40), ((1, 130, 70), 90), ((5, 16), 64)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OP = torch.ops.cogmerge.product_residual


def arguments(case, dtype, seed=0):
    shape, outputs = case
    generator = torch.Generator().manual_seed(seed)
    sizes = ((*shape[:-1], outputs), shape, (outputs, shape[-1]))
    residual, x, weight = (torch.randn(size, generator=generator) for size in sizes)
    return [t.to(dtype) for t in (residual, x, weight * shape[-1] ** -0.5)]


def test_hand_worked_rows():
    residual, x = torch.tensor([[10.0, 20.0, 30.0]]), torch.tensor([[1.0, 2.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, -1.0]])
    assert product_residual(residual, x, weight).tolist() == [[11.0, 22.0, 31.0]]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_torch_path_and_custom_op_equal_the_reference(case, dtype, close_to_reference):
    inputs = arguments(case, dtype)
    want = [reference(*inputs)]
    close_to_reference([product_residual(*inputs)], want, dtype, factor=3)
    close_to_reference([OP(*inputs)], want, dtype)


def test_with_gated_product_it_is_a_llama_mlp_and_its_residual():
    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2))
    x, residual = torch.randn(2, 2, 5, 24)
    y = product_residual(
        residual, gated_product(x, mlp.gate_proj.weight, mlp.up_proj.weight), mlp.down_proj.weight
    )
    torch.testing.assert_close(y, residual + mlp(x))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES] + [(CASES[1], dtype) for dtype in DTYPES[1:]],
)
def test_triton_path(case, dtype, triton_path, close_to_reference):
    inputs = arguments(case, dtype)
    upstream = (arguments(case, dtype, seed=1)[0],)
    outputs, gradients = triton_path("product_residual", *inputs, upstream=upstream)
    wide = [t.double().requires_grad_() for t in inputs]
    want = reference(*wide)
    close_to_reference(outputs, [want], dtype)
    close_to_reference(gradients, torch.autograd.grad(want, wide, upstream[0].double()), dtype, factor=3)


def test_a_stream_wider_than_the_product_keeps_its_dtype(triton_path, close_to_reference):
    residual, x, weight = arguments(CASES[1], torch.bfloat16)
    residual = residual.float() * 1.001
    want = [reference(residual, x, weight)]
    for got in (triton_path("product_residual", residual, x, weight)[0], [OP(residual, x, weight)]):
        assert got[0].dtype == torch.float32
        close_to_reference(got, want, torch.float32)


def test_hand_written_backward_passes_gradcheck():
    inputs = [t.requires_grad_() for t in arguments(((2, 3, 4), 5), torch.float64)]
    for run in (OP, product_residual):
        assert torch.autograd.gradcheck(run, inputs)


def test_custom_op_is_registered_properly_and_compiles_without_a_graph_break():
    inputs = [t.requires_grad_() for t in arguments(CASES[1], torch.float32)]
    torch.library.opcheck(OP.default, inputs)

    def run(*t):
        return (OP(*t) * product_residual(*t)).sum()

    want, got = run(*inputs), torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))


def test_dispatch_leaves_many_rows_and_training_to_cublas(monkeypatch):
    monkeypatch.setattr("vla.kernels.dispatch.triton_refusal", lambda x: None)
    monkeypatch.setattr("vla.kernels.dispatch.QUALIFIED", frozenset({"product_residual"}))
    monkeypatch.setattr("vla.kernels.dispatch.INTERPRETED", False)
    monkeypatch.setattr("vla.kernels.dispatch.FORCED", None)
    x, weight = torch.zeros(1, 192, 4), torch.zeros(8, 4)
    assert dispatch(x, weight).path == "triton"
    assert "193 rows" in dispatch(torch.zeros(193, 4), weight).reason
    assert "training" in dispatch(x, weight.clone().requires_grad_()).reason
    assert "torch.float16 and the rows torch.float32" in dispatch(x, weight.half()).reason


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (128, 64)])
def test_compiled_for_sm90(rows, columns, compile_for_h200):
    types = dict.fromkeys(["residual", "x", "weight", "out"], "*bf16")
    types |= dict.fromkeys(["rows", "inputs", "outputs"], "i32")
    switches = {"WIDEN": False, "ROWS": rows, "COLUMNS": columns, "DEPTH": 64}
    assert compile_for_h200(PRODUCT_KERNEL, types, switches)


@pytest.mark.parametrize(
    "change", [{0: torch.zeros(2, 9, 39)}, {1: torch.zeros(2, 9, 23)}, {2: torch.zeros(40)}]
)
def test_bad_input_is_refused_in_a_sentence(change):
    inputs = arguments(CASES[1], torch.float32)
    for index, value in change.items():
        inputs[index] = value
    with pytest.raises(UserError, match=r"must be \(..., D\), \(..., f\) and \(D, f\)"):
        product_residual(*inputs)

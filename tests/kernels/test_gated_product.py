"""K4, gate and up projection, against fp64 and against the MLP of transformers' Llama."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from vla.errors import UserError
from vla.kernels.gated_product import GATED_KERNEL, dispatch, gated_product, reference

# shape of x, f
CASES = [
    ((1, 1, 1), 1),
    ((2, 9, 24), 40),
    ((1, 130, 70), 90),  # two tiles of rows, of columns and of depth
    ((5, 16), 64),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OP = torch.ops.cogmerge.gated_product


def arguments(case, dtype, seed=0):
    shape, outputs = case
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(outputs, shape[-1], generator=generator) * shape[-1] ** -0.5 for _ in range(2))
    return [t.to(dtype) for t in (torch.randn(shape, generator=generator), *weights)]


def test_hand_worked_product():
    """silu(0) = 0 and silu(ln 3) = 3/4 ln 3."""
    log3 = torch.tensor(3.0).log()
    x, gate, up = (
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[2.0, -1.0], [0.0, 0.5]]),
        torch.tensor([[9.0, 9.0], [4.0, 0.0]]),
    )
    y = gated_product(x, gate * log3, up)
    torch.testing.assert_close(y, torch.tensor([[0.0, 4 * 0.75 * log3]]))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_torch_path_and_custom_op_equal_the_reference(case, dtype, close_to_reference):
    inputs = arguments(case, dtype)
    want = [reference(*inputs)]
    close_to_reference([gated_product(*inputs)], want, dtype, factor=3)  # rounds after every operation
    close_to_reference([OP(*inputs)], want, dtype)


def test_is_the_first_half_of_a_llama_mlp():
    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2))
    x = torch.randn(2, 5, 24)
    y = gated_product(x, mlp.gate_proj.weight, mlp.up_proj.weight)
    torch.testing.assert_close(mlp.down_proj(y), mlp(x))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES] + [(CASES[1], dtype) for dtype in DTYPES[1:]],
)
def test_triton_path(case, dtype, triton_path, close_to_reference):
    inputs = arguments(case, dtype)
    upstream = (torch.randn(*case[0][:-1], case[1], generator=torch.Generator().manual_seed(1)).to(dtype),)
    outputs, gradients = triton_path("gated_product", *inputs, upstream=upstream)
    wide = [t.double().requires_grad_() for t in inputs]
    want = reference(*wide)
    close_to_reference(outputs, [want], dtype)
    close_to_reference(gradients, torch.autograd.grad(want, wide, upstream[0].double()), dtype, factor=3)


def test_hand_written_backward_passes_gradcheck():
    inputs = [t.requires_grad_() for t in arguments(((2, 3, 4), 5), torch.float64)]
    for run in (OP, gated_product):
        assert torch.autograd.gradcheck(run, inputs)


def test_custom_op_is_registered_properly():
    torch.library.opcheck(OP.default, [t.requires_grad_() for t in arguments(CASES[1], torch.float32)])


def test_compiles_without_a_graph_break():
    inputs = [t.requires_grad_() for t in arguments(CASES[1], torch.float32)]

    def run(*t):
        return (OP(*t) * gated_product(*t)).sum()

    want, got = run(*inputs), torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))


def test_under_autocast_it_computes_in_its_dtype_as_the_mlp_does():
    x, gate, up = arguments(CASES[1], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = gated_product(x, gate, up)
        want = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    assert y.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(y, want)


def test_dispatch_leaves_many_rows_and_training_to_cublas(monkeypatch):
    monkeypatch.setattr("vla.kernels.dispatch.triton_refusal", lambda x: None)
    monkeypatch.setattr("vla.kernels.dispatch.QUALIFIED", frozenset({"gated_product"}))
    monkeypatch.setattr("vla.kernels.dispatch.INTERPRETED", False)
    monkeypatch.setattr("vla.kernels.dispatch.FORCED", None)
    x, gate = torch.zeros(1, 192, 4), torch.zeros(8, 4)
    assert dispatch(x, gate).path == "triton"
    assert "193 rows" in dispatch(torch.zeros(193, 4), gate).reason
    assert "training" in dispatch(x, gate.clone().requires_grad_()).reason
    assert dispatch(torch.zeros(193, 4), gate, "triton").path == "triton"
    assert "torch.float16 and the rows torch.float32" in dispatch(x, gate.half()).reason


@pytest.mark.parametrize("rows", [16, 128])
def test_compiled_for_sm90(rows, compile_for_h200):
    types = dict.fromkeys(["x", "gate", "up", "out"], "*bf16")
    types |= dict.fromkeys(["rows", "inputs", "outputs"], "i32")
    switches = {"WIDEN": False, "ROWS": rows, "COLUMNS": 64, "DEPTH": 64}
    assert compile_for_h200(GATED_KERNEL, types, switches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(24)}, r"must be \(..., d\) and twice"),
        ({1: torch.zeros(40, 23), 2: torch.zeros(40, 23)}, "gated_product: x"),
        ({2: torch.zeros(41, 24)}, r"up \(41, 24\)"),
        ({2: torch.zeros(40, 24).half()}, "must be of one dtype"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(change, message):
    inputs = arguments(CASES[1], torch.float32)
    for index, value in change.items():
        inputs[index] = value
    with pytest.raises(UserError, match=message):
        gated_product(*inputs)

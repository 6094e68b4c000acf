"""K6 against a dense softmax in fp64 and against the policy's attention, over layouts, groups and padding."""

import pytest
import torch

from vla.errors import UserError
from vla.kernels.coupled_attention import ATTENTION_KERNEL, coupled_attention, dispatch, reference
from vla.kernels.launch import in_autocast
from vla.policy.attention import masked_attention
from vla.policy.masks import CoupledMask

# B, H, G, S, d, prefix, padded
CASES = [
    (1, 1, 1, 1, 1, 1, False),
    (2, 4, 2, 9, 8, 6, True),
    (1, 2, 1, 21, 20, 16, False),
    (1, 2, 2, 70, 16, 63, True),  # two tiles of keys, the second with causal and action rows
    (1, 1, 1, 5, 8, 0, False),
    (1, 2, 2, 7, 24, 7, True),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OP = torch.ops.cogmerge.coupled_attention


def arguments(case, dtype, seed=0):
    batch, heads, groups, length, width, prefix, padded = case
    generator = torch.Generator().manual_seed(seed)

    def tokens(heads):  # laid out as a projection leaves it
        return torch.randn(batch, length, heads, width, generator=generator).to(dtype).transpose(1, 2)

    valid = None
    if padded:
        valid = torch.rand(batch, length, generator=generator) > 0.4
        valid[:, 0] = True
    return tokens(heads), tokens(groups), tokens(groups), prefix, valid


def through_op(q, k, v, prefix, valid):
    return OP(q, k, v, valid, prefix, q.shape[-1] ** -0.5)[0]


def test_hand_worked_visibility():
    """Equal logits: a row is the mean of the values it sees."""
    zeros, v = torch.zeros(1, 1, 4, 1), torch.tensor([1.0, 2.0, 6.0, 11.0]).reshape(1, 1, 4, 1)
    assert coupled_attention(zeros, zeros, v, 2).flatten().tolist() == [1.0, 1.5, 5.0, 5.0]
    valid = torch.tensor([[True, False, True, True]])
    assert coupled_attention(zeros, zeros, v, 2, valid).flatten().tolist() == [1.0, 1.0, 6.0, 6.0]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_torch_path_and_custom_op_equal_the_reference(case, dtype, close_to_reference):
    inputs = arguments(case, dtype)
    want = [reference(*inputs)]
    close_to_reference([coupled_attention(*inputs)], want, dtype)
    close_to_reference([through_op(*inputs)], want, dtype)


@pytest.mark.parametrize("queries", [1, 8, 66])
@pytest.mark.parametrize("padded", [True, False])
def test_the_last_queries_alone_get_what_they_get_among_all(queries, padded, triton_path, close_to_reference):
    """Queries of the action block alone, with some of the prefix, and over two tiles."""
    q, k, v, prefix, valid = arguments((1, 2, 1, 70, 8, 64, padded), torch.float32)
    last = q[:, :, -queries:]
    want = reference(q, k, v, prefix, valid)[:, :, -queries:]
    close_to_reference([reference(last, k, v, prefix, valid)], [want], torch.float64)
    close_to_reference([coupled_attention(last, k, v, prefix, valid)], [want], torch.float32)
    upstream = (arguments((1, 2, 1, 70, 8, 64, padded), torch.float32, seed=1)[0][:, :, -queries:],)
    outputs, gradients = triton_path("coupled_attention", last, k, v, prefix, valid, upstream=upstream)
    close_to_reference(outputs, [want], torch.float32)
    wide = [t.double().requires_grad_() for t in (last, k, v)]
    wanted = torch.autograd.grad(reference(*wide, prefix, valid), wide, upstream[0].double())
    close_to_reference(gradients, wanted, torch.float32, factor=3)


def test_training_in_bf16_on_a_cpu_goes_around_the_slow_backward_of_sdpa():
    q, k, v, prefix, valid = arguments(CASES[1], torch.float32)
    q.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        for out in (coupled_attention(q, k, v, prefix), coupled_attention(q, k, v, prefix, valid)):
            names, todo = set(), [out.grad_fn]
            while todo:
                node = todo.pop()
                names.add(type(node).__name__)
                todo += [parent for parent, _ in node.next_functions if parent is not None]
            assert not any("ScaledDotProduct" in name for name in names), names
            assert any("Softmax" in name for name in names)
    want = reference(q, k, v, prefix, valid)
    assert (out - want).norm() / want.norm() < 1e-2


def test_autocast_decides_in_which_dtype_the_kernel_computes():
    q, k, v, *_ = arguments(CASES[1], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert [t.dtype for t in in_autocast(q, k, v.bfloat16())] == [torch.bfloat16] * 3
    assert in_autocast(q, k)[0] is q


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_policys_mask(case):
    q, k, v, prefix, valid = arguments(case, torch.float32)
    want = masked_attention(q, k, v, CoupledMask(q.shape[2], prefix, valid), 0.3)
    torch.testing.assert_close(coupled_attention(q, k, v, prefix, valid, 0.3), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES] + [(CASES[1], dtype) for dtype in DTYPES[1:]],
)
def test_triton_path(case, dtype, triton_path, close_to_reference):
    q, k, v, prefix, valid = arguments(case, dtype)
    upstream = (arguments(case, dtype, seed=1)[0],)
    outputs, gradients = triton_path("coupled_attention", q, k, v, prefix, valid, upstream=upstream)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    want = reference(*wide, prefix, valid)
    close_to_reference(outputs, [want], dtype)
    if q.shape[2] > 1:  # one key: the softmax is constant and its gradient zero
        gradients_wanted = torch.autograd.grad(want, wide, upstream[0].double())
        close_to_reference(gradients, gradients_wanted, dtype, factor=3)


def test_output_joins_its_heads_without_a_copy(triton_path):
    inputs = arguments(CASES[2], torch.float32)
    assert triton_path("coupled_attention", *inputs)[0][0].transpose(1, 2).is_contiguous()
    assert through_op(*inputs).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("case", [(2, 4, 2, 5, 3, 3, True), (1, 2, 2, 4, 2, 4, False)])
def test_hand_written_backward_passes_gradcheck(case):
    q, k, v, prefix, valid = arguments(case, torch.float64)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    for run in (through_op, coupled_attention):
        assert torch.autograd.gradcheck(lambda *t, run=run: run(*t, prefix, valid), inputs)


def test_custom_op_is_registered_properly():
    q, k, v, prefix, valid = arguments(CASES[1], torch.float32)
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(OP.default, (*inputs, valid, prefix, 0.5))


def test_compiles_without_a_graph_break():
    q, k, v, prefix, valid = arguments(CASES[1], torch.float32)
    inputs = [t.requires_grad_() for t in (q, k, v)]

    def run(q, k, v):
        out = through_op(q, k, v, prefix, valid) + coupled_attention(q, k, v, prefix, valid)
        return (out * coupled_attention(q, k, v, prefix)).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want, got = run(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))


def test_dispatch_leaves_batches_and_training_to_sdpa(monkeypatch):
    from vla.kernels import coupled_attention as file

    monkeypatch.setattr(file, "triton_refusal", lambda q: None)
    monkeypatch.setattr("vla.kernels.dispatch.QUALIFIED", frozenset({"coupled_attention"}))
    monkeypatch.setattr("vla.kernels.dispatch.INTERPRETED", False)
    monkeypatch.setattr("vla.kernels.dispatch.FORCED", None)
    q = torch.zeros(1, 1, 2, 4)
    assert dispatch(q).path == "triton"
    assert "batch of 2" in dispatch(q.expand(2, -1, -1, -1)).reason
    assert "backward" in dispatch(q.clone().requires_grad_()).reason
    assert dispatch(q.expand(2, -1, -1, -1), "triton").path == "triton"
    assert "300 channels" in dispatch(torch.zeros(1, 1, 1, 300)).reason


@pytest.mark.parametrize("padded", [True, False])
def test_compiled_for_sm90(padded, compile_for_h200):
    types = dict.fromkeys(["q", "k", "v", "out"], "*bf16") | {"lse": "*fp32", "scale": "fp32"}
    types |= {f"{x}_{axis}": "i32" for x in "qkv" for axis in "bhs"}
    types |= dict.fromkeys(["heads", "group", "queries", "length", "prefix", "width"], "i32")
    types |= {"valid": "*u8"} if padded else {}
    switches = {"VALID": padded, "WIDEN": False, "TILE": 64, "WIDTH": 128}
    assert compile_for_h200(ATTENTION_KERNEL, types, switches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(4, 9, 8)}, "must be"),
        ({1: torch.zeros(2, 3, 9, 8), 2: torch.zeros(2, 3, 9, 8)}, "must divide"),
        ({0: torch.zeros(2, 4, 10, 8)}, "no more queries than keys"),
        ({2: torch.zeros(2, 2, 8, 8)}, "twice"),
        ({3: 10}, "prefix of 10 does not fit into 9"),
        ({4: torch.ones(2, 9)}, "must be booleans"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(change, message):
    inputs = list(arguments(CASES[1], torch.float32))
    for index, value in change.items():
        inputs[index] = value
    with pytest.raises(UserError, match=message):
        coupled_attention(*inputs)

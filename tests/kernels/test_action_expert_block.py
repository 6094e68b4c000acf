"""K5 against its formula in fp64 and against the policy's block, over shapes, gates and streams."""

import pytest
import torch

from vla.errors import UserError
from vla.kernels.action_expert_block import (
    FEW_ROWS_KERNEL,
    TWO_STREAMS_KERNEL,
    WEIGHTS,
    action_expert_block,
    dispatch,
    reference,
)
from vla.policy.action_decoders.cross_attention import CrossAttentionBlock

# B, R, A, V, d, heads
CASES = [
    (1, 1, 1, 1, 4, 2),
    (2, 9, 9, 32, 32, 4),  # the nano expert: a keyframe row, the state among the queries
    (1, 8, 65, 70, 24, 2),  # two tiles of keys in both streams, heads of 12
    (1, 17, 3, 0, 16, 1),  # no vision; two tiles of 16 rows in a product, one in the attention
    (1, 3, 2, 5, 160, 2),  # two tiles of depth
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OP = torch.ops.cogmerge.action_expert_block


def arguments(case, dtype, seed=0):
    batch, rows, actions, visions, dim, _ = case
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0, shift=0.0):
        return (torch.randn(shape, generator=generator) * scale + shift).to(dtype)

    streams = [random(batch, n, dim) for n in (rows, actions, actions, visions, visions)]
    shapes = {"gate": (), "norm": (dim,)} | {name: (dim,) for name in WEIGHTS if "bias" in name}
    weights = [
        random(*shapes[name], scale=0.5, shift=name == "norm")
        if name in shapes
        else random(dim, dim, scale=dim**-0.5)
        for name in WEIGHTS
    ]
    return *streams, *weights


def through_op(*tensors, heads):
    return OP(*tensors, heads, 1e-5)


def test_hand_worked_block():
    """Width 2, one head: q_A . k_A = 1, gated q_T . k_T = 1/2 * 2, so that both streams get half."""
    eye, zero = torch.eye(2), torch.zeros(2)
    x = torch.tensor([[[1.0, 0.0]]])
    k_action, v_action = torch.tensor([[[1.0, 5.0]]]), torch.tensor([[[2.0, 0.0]]])
    k_vision, v_vision = torch.tensor([[[2.0, 5.0]]]), torch.tensor([[[0.0, 4.0]]])
    weights = (eye, zero, eye, zero, torch.tensor(0.0), eye, zero, torch.ones(2), zero, eye, zero)
    # z = (1, 0) + (1, 2) = (2, 2): LayerNorm gives (0, 0); the bias then is the result, cut at 0.
    got = action_expert_block(
        x, k_action, v_action, k_vision, v_vision, *weights[:-1], torch.tensor([3.0, -3.0]), heads=1
    )
    assert got.tolist() == [[[3.0, 0.0]]]
    # With v_A = (2, 2): z = (2, 3), normalised (-1, 1).
    v_action = torch.tensor([[[2.0, 2.0]]])
    got = action_expert_block(x, k_action, v_action, k_vision, v_vision, *weights, heads=1, eps=0.0)
    torch.testing.assert_close(got, torch.tensor([[[0.0, 1.0]]]))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_torch_path_and_custom_op_equal_the_reference(case, dtype, close_to_reference):
    inputs = arguments(case, dtype)
    want = [reference(*inputs, heads=case[-1])]
    # The torch path rounds after every operation, as the policy does; the op once.
    close_to_reference([action_expert_block(*inputs, heads=case[-1])], want, dtype, factor=3)
    close_to_reference([through_op(*inputs, heads=case[-1])], want, dtype)


@pytest.mark.parametrize("case", CASES)
def test_is_the_policys_block(case):
    batch, rows, actions, visions, dim, heads = case
    torch.manual_seed(0)
    block = CrossAttentionBlock(dim, heads)
    with torch.no_grad():
        block.gate.fill_(-0.7)
        block.norm.weight.normal_()
    x, h_action, h_vision = (torch.randn(batch, n, dim) for n in (rows, actions, visions))
    weights = (
        block.q_action.weight, block.q_action.bias, block.q_vision.weight, block.q_vision.bias, block.gate,
        block.out.weight, block.out.bias, block.norm.weight, block.norm.bias,
        block.feed.weight, block.feed.bias,
    )  # fmt: skip
    streams = (
        block.k_action(h_action),
        block.v_action(h_action),
        block.k_vision(h_vision),
        block.v_vision(h_vision),
    )
    got = action_expert_block(x, *streams, *weights, heads=heads, eps=block.norm.eps)
    torch.testing.assert_close(got, block(x, h_action, h_vision), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES] + [(CASES[1], dtype) for dtype in DTYPES[1:]],
)
def test_triton_path(case, dtype, triton_path, close_to_reference):
    inputs = arguments(case, dtype)
    upstream = (arguments(case, dtype, seed=1)[0],)
    outputs, gradients = triton_path("action_expert_block", *inputs, upstream=upstream, heads=case[-1])
    wide = [t.double().requires_grad_() for t in inputs]
    want = reference(*wide, heads=case[-1])
    close_to_reference(outputs, [want], dtype)
    if dtype == torch.float32:  # in less, a row near zero may fall on the other side of the ReLU
        gradients_wanted = torch.autograd.grad(want, wide, upstream[0].double())
        # The gradient of a bias shared by all keys' logits is exactly zero: only its size can be compared.
        pairs = [(g, w) for g, w in zip(gradients, gradients_wanted, strict=True) if w.norm() > 1e-6]
        assert len(pairs) >= 12 or case[3] == 0
        close_to_reference(*(list(side) for side in zip(*pairs, strict=True)), dtype, factor=10)


def test_under_autocast_it_computes_in_its_dtype_as_the_policys_block_does(triton_path):
    """Rows leave one block in bf16 and enter the next, whose parameters are fp32."""
    x, *rest = arguments(CASES[1], torch.float32)
    heads = CASES[1][-1]
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch(x.bfloat16(), heads, tuple(rest[4:])).reason == dispatch(x, heads).reason
        want = action_expert_block(x.bfloat16(), *rest, heads=heads)
    streams, weights = (t.bfloat16() for t in rest[:4]), rest[4:]
    narrow = [t.bfloat16() if t.ndim == 2 else t for t in weights]
    got = triton_path("action_expert_block", x.bfloat16(), *streams, *narrow, heads=heads)[0][0]
    assert want.dtype == got.dtype == torch.bfloat16
    assert (got.float() - want.float()).norm() <= 0.02 * want.float().norm()


def test_streams_may_be_slices_of_a_larger_tensor(triton_path, close_to_reference):
    """Keys and values of one projection, side by side, are read where they lie."""
    x, _, _, _, _, *weights = arguments(CASES[1], torch.float32)
    wide = torch.randn(2, 41, 64, generator=torch.Generator().manual_seed(3))
    k, v = wide.chunk(2, dim=-1)
    streams = (k[:, :9], v[:, :9], k[:, 9:], v[:, 9:])
    got = triton_path("action_expert_block", x, *(s.contiguous() for s in streams), *weights, heads=4)[0]
    close_to_reference(got, [reference(x, *streams, *weights, heads=4)], torch.float32)
    close_to_reference(
        triton_path("action_expert_block", x, *streams, *weights, heads=4)[0], got, torch.float32
    )


@pytest.mark.parametrize("case", [(2, 3, 2, 3, 4, 2), (1, 2, 1, 2, 4, 1)])
def test_hand_written_backward_passes_gradcheck(case):
    inputs = [t.requires_grad_() for t in arguments(case, torch.float64, seed=4)]
    for run in (through_op, action_expert_block):
        assert torch.autograd.gradcheck(lambda *t, run=run: run(*t, heads=case[-1]), inputs)


def test_custom_op_is_registered_properly():
    inputs = [t.requires_grad_() for t in arguments((2, 3, 2, 3, 8, 2), torch.float32)]
    torch.library.opcheck(OP.default, (*inputs, 2, 1e-5))


def test_compiles_without_a_graph_break():
    inputs = [t.requires_grad_() for t in arguments((1, 3, 2, 3, 8, 2), torch.float32)]

    def run(*t):
        return (through_op(*t, heads=2) * action_expert_block(*t, heads=2)).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want, got = run(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))


def test_dispatch_leaves_batches_and_training_to_torch(monkeypatch):
    from vla.kernels import action_expert_block as file
    from vla.kernels import dispatch as dispatching

    for place in (file, dispatching):
        monkeypatch.setattr(place, "triton_refusal", lambda x: None)
    monkeypatch.setattr("vla.kernels.dispatch.QUALIFIED", frozenset({"action_expert_block"}))
    monkeypatch.setattr("vla.kernels.dispatch.INTERPRETED", False)
    monkeypatch.setattr("vla.kernels.dispatch.FORCED", None)
    x, weight = torch.zeros(1, 8, 16), torch.zeros(16, 16)
    assert dispatch(x, 2, (weight,)).path == "triton"
    assert "batch of 2" in dispatch(x.expand(2, -1, -1), 2).reason
    trained = torch.nn.Parameter(weight)
    assert "training" in dispatch(x, 2, (trained,)).reason
    with torch.no_grad():
        assert dispatch(x, 2, (trained,)).path == "triton"
    assert "65 rows" in dispatch(torch.zeros(1, 65, 16), 2).reason
    assert "260 channels" in dispatch(torch.zeros(1, 1, 520), 2).reason
    assert "torch.float16 and the rows torch.float32" in dispatch(x, 2, (weight.half(),)).reason


@pytest.mark.parametrize(
    "flags", [(True, False, False, False), (False, False, True, False), (False, True, False, True)]
)
def test_products_compile_for_sm90(flags, compile_for_h200):
    pair, norm, residual, relu = flags
    types = dict.fromkeys(["weight", "bias", "second_weight", "second_bias", "norm", "norm_bias"], "*bf16")
    types |= {
        "x": "*fp32" if norm or residual else "*bf16",
        "residual": "*bf16",
        "out": "*bf16" if relu else "*fp32",
    }
    types |= dict.fromkeys(["rows", "inputs", "outputs"], "i32") | {"eps": "fp32"}
    switches = {"PAIR": pair, "NORM": norm, "RESIDUAL": residual, "RELU": relu, "WIDEN": False}
    assert compile_for_h200(FEW_ROWS_KERNEL, types, switches | {"ROWS": 16, "COLUMNS": 16, "DEPTH": 128})


def test_attention_compiles_for_sm90(compile_for_h200):
    types = dict.fromkeys(["k_action", "v_action", "k_vision", "v_vision", "gate"], "*bf16")
    types |= {"q": "*fp32", "out": "*fp32", "scale": "fp32"}
    types |= {f"{stream}_{axis}": "i32" for stream in ("ka", "va", "kt", "vt") for axis in "bs"}
    types |= dict.fromkeys(["samples", "rows", "actions", "visions", "heads", "width"], "i32")
    switches = {"WIDEN": False, "ROWS": 16, "TILE": 64, "WIDTH": 64}
    assert compile_for_h200(TWO_STREAMS_KERNEL, types, switches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 9, 30)}, "divisible by 4 heads"),
        ({1: torch.zeros(2, 9, 16)}, r"k_action \(2, 9, 16\) and v_action"),
        ({3: torch.zeros(1, 32, 32), 4: torch.zeros(1, 32, 32)}, "must both be"),
        ({1: torch.zeros(2, 0, 32), 2: torch.zeros(2, 0, 32)}, "the action stream is empty"),
        ({5: torch.zeros(32, 16)}, r"q_action is \(32, 16\); it must be \(32, 32\)"),
        ({9: torch.zeros(1)}, r"gate is \(1,\); it must be \(\)"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(change, message):
    inputs = list(arguments(CASES[1], torch.float32))
    for index, value in change.items():
        inputs[index] = value
    with pytest.raises(UserError, match=message):
        action_expert_block(*inputs, heads=4)


def test_a_missing_weight_is_refused_in_a_sentence():
    with pytest.raises(UserError, match="takes 11 weights"):
        action_expert_block(*arguments(CASES[1], torch.float32)[:-1], heads=4)

"""K4, projections with RoPE, against fp64 with complex numbers and against the attention of transformers."""

import math

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from vla.errors import UserError
from vla.kernels.qkv_rope import QKV_KERNEL, dispatch, qkv_rope, reference

# B, N, D, heads, groups, width of a head, biased, one table for all samples
CASES = [
    (1, 1, 1, 1, 1, 2, False, True),
    (2, 5, 24, 4, 2, 6, True, False),
    (1, 130, 70, 2, 1, 40, False, True),  # two tiles of rows and of depth, more than one half of 16
    (2, 7, 16, 2, 2, 8, True, True),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def arguments(case, dtype, seed=0):
    batch, tokens, inputs, heads, groups, width, biased, shared = case
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(size, generator=generator)

    weights = [random(many * width, inputs) * inputs**-0.5 for many in (heads, groups, groups)]
    angle = random(1 if shared else batch, tokens, width)
    biases = tuple(random(len(w)).to(dtype) for w in weights) if biased else None
    tensors = [random(batch, tokens, inputs), *weights, angle.cos(), angle.sin()]
    return [*(t.to(dtype) for t in tensors), biases]


def through_op(x, q, k, v, cos, sin, biases=None):
    return torch.ops.cogmerge.qkv_rope(x, q, k, v, cos, sin, *(biases or (None, None, None)))


def test_a_quarter_turn_by_hand():
    """One head of two channels at 90 degrees: (a, b) becomes (-b, a); values stay."""
    x, eye = torch.tensor([[[3.0, 5.0]]]), torch.eye(2)
    angle = torch.full((1, 1, 2), math.pi / 2)
    q, k, v = qkv_rope(x, eye, 2 * eye, eye, angle.cos(), angle.sin())
    for got, want in ((q, [-5.0, 3.0]), (k, [-10.0, 6.0]), (v, [3.0, 5.0])):
        torch.testing.assert_close(got, torch.tensor(want).reshape(1, 1, 1, 2))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_torch_path_and_custom_op_equal_the_reference(case, dtype, close_to_reference):
    inputs = arguments(case, dtype)
    want = reference(*inputs)
    close_to_reference(qkv_rope(*inputs), want, dtype, factor=3)  # rounds after every operation
    close_to_reference(through_op(*inputs), want, dtype)


@pytest.mark.parametrize(
    ("family", "config_class"), [(LlamaAttention, LlamaConfig), (Qwen2Attention, Qwen2Config)]
)
def test_is_what_an_attention_of_transformers_hands_to_its_kernel(family, config_class):
    torch.manual_seed(0)
    config = config_class(hidden_size=24, num_attention_heads=4, num_key_value_heads=2)
    config._attn_implementation = "seen_by_the_test"
    seen = []

    def watch(module, q, k, v, mask, **options):
        seen.extend((q, k, v))
        return q.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("seen_by_the_test", watch)
    layer, x = family(config, 0), torch.randn(2, 5, 24)
    tables = LlamaRotaryEmbedding(LlamaConfig(hidden_size=24, num_attention_heads=4))(
        x, torch.arange(5)[None]
    )
    layer(hidden_states=x, position_embeddings=tables, attention_mask=None)
    parts = (layer.q_proj, layer.k_proj, layer.v_proj)
    biases = None if parts[0].bias is None else tuple(p.bias for p in parts)
    assert (biases is None) == (family is LlamaAttention)
    got = qkv_rope(x, *(p.weight for p in parts), *tables, biases)
    for ours, theirs in zip(got, seen, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES] + [(CASES[1], dtype) for dtype in DTYPES[1:]],
)
def test_triton_path(case, dtype, triton_path, close_to_reference):
    inputs = arguments(case, dtype)
    want = reference(*inputs)
    generator = torch.Generator().manual_seed(1)
    upstream = tuple(torch.randn(t.shape, generator=generator).to(dtype) for t in want)
    outputs, gradients = triton_path("qkv_rope", *inputs, upstream=upstream)
    close_to_reference(outputs, want, dtype)
    assert all(t.is_contiguous() for t in outputs)
    wide = [t.double().requires_grad_() for t in inputs[:4]]
    biases = None if inputs[6] is None else tuple(b.double() for b in inputs[6])
    results = reference(*wide, *inputs[4:6], biases)
    wanted = torch.autograd.grad(results, wide, [g.double() for g in upstream])
    close_to_reference(gradients[:4], wanted, dtype, factor=3)
    assert gradients[4] is None and gradients[5] is None  # tables of positions are no parameters


@pytest.mark.parametrize("case", [(2, 3, 4, 2, 1, 4, True, False), (1, 2, 3, 1, 1, 2, False, True)])
def test_hand_written_backward_passes_gradcheck(case):
    *inputs, biases = arguments(case, torch.float64)
    cos, sin = inputs[4:]
    learned = [t.requires_grad_() for t in (*inputs[:4], *(biases or ()))]
    for run in (through_op, qkv_rope):
        assert torch.autograd.gradcheck(
            lambda x, q, k, v, *b, run=run: run(x, q, k, v, cos, sin, b or None), learned
        )


def test_custom_op_is_registered_properly_and_compiles_without_a_graph_break():
    *inputs, biases = arguments(CASES[1], torch.float32)
    learned = [t.requires_grad_() for t in inputs[:4]]
    op = torch.ops.cogmerge.qkv_rope.default
    torch.library.opcheck(op, (*learned, *inputs[4:], *(b.requires_grad_() for b in biases)))

    def run(*t):
        pairs = zip(through_op(*t, biases), qkv_rope(*t, biases), strict=True)
        return sum((a * b).sum() for a, b in pairs)

    want, got = run(*inputs), torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, learned), torch.autograd.grad(want, learned))


def test_dispatch_leaves_many_rows_and_training_to_cublas(monkeypatch):
    monkeypatch.setattr("vla.kernels.dispatch.triton_refusal", lambda x: None)
    monkeypatch.setattr("vla.kernels.dispatch.QUALIFIED", frozenset({"qkv_rope"}))
    monkeypatch.setattr("vla.kernels.dispatch.INTERPRETED", False)
    monkeypatch.setattr("vla.kernels.dispatch.FORCED", None)
    x, q, cos = torch.zeros(1, 192, 4), torch.zeros(8, 4), torch.zeros(1, 192, 4)
    assert dispatch(x, q, cos).path == "triton"
    assert "384 rows" in dispatch(x.expand(2, -1, -1), q, cos).reason
    assert "training" in dispatch(x, q.clone().requires_grad_(), cos).reason
    assert "torch.float16 and the rows torch.float32" in dispatch(x, q.half(), cos).reason
    assert "300 channels exceed" in dispatch(x, q, torch.zeros(1, 192, 300)).reason


@pytest.mark.parametrize(("rows", "half", "biased"), [(128, 64, False), (16, 32, True)])
def test_compiled_for_sm90(rows, half, biased, compile_for_h200):
    pointers = ["x", "q", "k", "v", "cos", "sin", "q_out", "k_out", "v_out"]
    pointers += ["q_bias", "k_bias", "v_bias"] if biased else []
    sizes = ["heads", "groups", "rows", "per_sample", "inputs", "half", "table_sample"]
    types = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(sizes, "i32")
    switches = {"BIAS": biased, "WIDEN": False, "ROWS": rows, "HALF": half, "DEPTH": 64}
    assert compile_for_h200(QKV_KERNEL, types, switches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 5, 23)}, r"must be \(B, N, D\)"),
        ({3: torch.zeros(6, 24)}, r"v \(6, 24\)"),
        ({4: torch.zeros(2, 4, 6), 5: torch.zeros(2, 4, 6)}, r"must be \(B or 1, N, d\)"),
        ({4: torch.zeros(2, 5, 5), 5: torch.zeros(2, 5, 5)}, "whole heads of 5, even"),
        ({6: (torch.zeros(24), torch.zeros(12), torch.zeros(11))}, "biases must be three"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(change, message):
    inputs = arguments(CASES[1], torch.float32)
    for index, value in change.items():
        inputs[index] = value
    with pytest.raises(UserError, match=message):
        qkv_rope(*inputs)

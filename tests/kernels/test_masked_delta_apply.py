"""K7 against its formula bit by bit, and against the masks and weights that the experts store."""

import pytest
import torch

from vla.errors import UserError
from vla.kernels.masked_delta_apply import APPLY_KERNEL, masked_delta_apply, reference

SHAPES = [(1,), (8,), (3, 5), (7, 301)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OP = torch.ops.cogmerge.masked_delta_apply


def arguments(shape, dtype, seed=0):
    """out, base, delta, packed; `out` is NaN, and spare bits of the mask are random: nobody reads them."""
    generator = torch.Generator().manual_seed(seed)
    base, delta = torch.randn(2, *shape, generator=generator).to(dtype)
    bits = torch.randint(0, 256, ((base.numel() + 7) // 8,), generator=generator, dtype=torch.uint8)
    return torch.full(shape, torch.nan, dtype=dtype), base, delta, bits


def test_by_hand():
    base, delta = torch.arange(10.0), torch.full((10,), 100.0)
    packed = torch.tensor([0b10000010, 0b01], dtype=torch.uint8)
    out = masked_delta_apply(torch.empty(10), base, delta, packed, 0.5)
    assert out.tolist() == [0, 51, 2, 3, 4, 5, 6, 57, 58, 9]


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_path_and_custom_op_equal_the_reference(shape, dtype, scale, close_to_reference):
    inputs = arguments(shape, dtype)
    want = [reference(*inputs[1:], scale)]
    OP(*inputs, scale)
    close_to_reference(inputs[:1], want, dtype)
    close_to_reference([masked_delta_apply(*arguments(shape, dtype), scale)], want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_path(shape, dtype, triton_path, close_to_reference):
    out, base, delta, packed = arguments(shape, dtype)
    got = triton_path("masked_delta_apply", out, base, delta, packed, 0.3)[0]
    close_to_reference(got, [reference(base, delta, packed, 0.3)], dtype)


def test_agrees_with_the_experts_masks_and_weights(triton_path):
    """The experts' own packing and unpacking; fp32 sums of scale 1 are equal bit for bit."""
    from vla.experts.task_masks import pack, signed_update

    torch.manual_seed(0)
    base, delta, mask = torch.randn(5, 13), torch.randn(5, 13), torch.rand(5, 13) > 0.5
    want = base + signed_update(delta, mask)
    assert torch.equal(masked_delta_apply(torch.empty(5, 13), base, delta, pack(mask)), want)
    got = triton_path("masked_delta_apply", torch.empty(5, 13), base, delta, pack(mask))[0][0]
    assert torch.equal(got.cpu(), want)


def test_masked_out_weights_are_the_base_bit_for_bit(triton_path):
    _, base, delta, packed = arguments((64,), torch.float32)
    kept = torch.tensor([bool(packed[i // 8] >> i % 8 & 1) for i in range(64)])
    delta[~kept] = torch.nan
    base[:8] = -0.0
    for out in (
        masked_delta_apply(torch.empty(64), base, delta, packed),
        triton_path("masked_delta_apply", torch.empty(64), base, delta, packed)[0][0].cpu(),
    ):
        assert torch.equal(out[~kept].view(torch.int32), base[~kept].view(torch.int32))
        assert out.isfinite().all()


def test_a_tensor_of_several_blocks_written_with_gaps(monkeypatch):
    monkeypatch.setattr("vla.kernels.masked_delta_apply.BLOCK", 64)
    _, base, delta, packed = arguments((13, 15), torch.float32)
    want = reference(base, delta, packed, 0.3)
    for out in (torch.empty(13, 15), torch.empty(15, 13).T, torch.empty(0)):
        n = out.numel()  # the last is empty
        given = (t.reshape(-1)[:n].view(out.shape) for t in (base, delta))
        got = masked_delta_apply(out, *given, packed[: (n + 7) // 8], 0.3)
        torch.testing.assert_close(got.double(), want.reshape(-1)[:n].view(out.shape))


def test_switches_a_live_parameter_in_place():
    layer = torch.nn.Linear(6, 4)
    _, base, delta, packed = arguments((4, 6), torch.float32)
    pointer = layer.weight.data_ptr()
    assert masked_delta_apply(layer.weight, base, delta, packed) is layer.weight
    assert layer.weight.data_ptr() == pointer and layer.weight.requires_grad
    torch.testing.assert_close(layer.weight.double(), reference(base, delta, packed))
    masked_delta_apply(base, base, delta, packed)  # base may be the buffer itself
    torch.testing.assert_close(base, layer.weight.data)


def test_mixed_dtypes_are_summed_wide_and_rounded_once():
    """A delta just above half a bf16 step rounds up; rounded to bf16 first, it would be lost."""
    base, delta = torch.tensor([1.0]).bfloat16(), torch.tensor([2.0**-8 * (1 + 2.0**-9)])
    packed = torch.ones(1, dtype=torch.uint8)
    out = masked_delta_apply(torch.empty(1, dtype=torch.bfloat16), base, delta, packed)
    assert out.item() == 1 + 2.0**-7


def test_custom_op_is_registered_properly_and_compiles():
    inputs = arguments((3, 5), torch.float32)
    inputs[0].zero_()  # opcheck compares results with ==, which NaN fails
    torch.library.opcheck(OP.default, (*inputs, 0.5))

    def switch(out, base, delta, packed):
        masked_delta_apply(out, base, delta, packed, 2.0)
        OP(base, base, delta, packed, 1.0)
        return out + base

    compiled = torch.compile(switch, fullgraph=True, backend="aot_eager")
    want = switch(*[t.clone() for t in inputs])
    torch.testing.assert_close(compiled(*[t.clone() for t in inputs]), want)


def test_compiled_for_sm90(compile_for_h200):
    types = dict.fromkeys(["out", "base", "delta"], "*bf16")
    types |= {"packed": "*u8", "count": "i32", "scale": "fp32"}
    assert compile_for_h200(APPLY_KERNEL, types, {"BYTES": 256})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(5, 3)}, "one shape"),
        ({3: torch.zeros(3, dtype=torch.uint8)}, r"no one-bit mask of 15 weights; it takes uint8 \(2,\)"),
        ({3: torch.zeros(15, dtype=torch.bool)}, "one-bit mask"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(change, message):
    inputs = list(arguments((3, 5), torch.float32))
    for index, value in change.items():
        inputs[index] = value
    with pytest.raises(UserError, match=message):
        masked_delta_apply(*inputs)

"""Task masks: the rule, the bits, and what the ratios say of experts that have nothing in common."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.experts.low_rank import LowRank
from vla.experts.merging.task_arithmetic import task_arithmetic
from vla.experts.merging.ties import ties
from vla.experts.task_masks import (
    BLOCK,
    MaskRatios,
    pack,
    projection_scale,
    scale_factor,
    signed_update,
    task_mask,
    unaligned,
    unpack,
)


def test_rule_worked_by_hand():
    delta = torch.tensor([1.0, 1.0, -1.0, 0.0, 0.6, 2.0])
    merged = torch.tensor([1.0, 3.0, 1.0, 0.5, 1.6, -1.0])
    # strict: the fifth, 0.6 > 0.6 · 1, is not kept; the last is, although the merge points against it
    assert task_mask(delta, merged, 0.6).tolist() == [True, False, False, False, False, True]


@pytest.mark.parametrize("entries", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_blocks_are_the_whole(entries):
    """Masks and counts are computed block by block, of transposed tensors too."""
    generator = torch.Generator().manual_seed(entries)
    deltas = [torch.randn(3, entries, generator=generator).T for _ in range(2)]
    merged = torch.randn(entries, 3, generator=generator)
    masks = [task_mask(delta, merged, 0.6) for delta in deltas]
    for mask, delta in zip(masks, deltas, strict=True):
        assert torch.equal(mask, delta.abs() > 0.6 * (merged - delta).abs())
    ratios = MaskRatios(2)
    ratios.add(masks)
    assert (ratios.entries, ratios.kept) == (3 * entries, [int(mask.sum()) for mask in masks])
    assert ratios.selfish == int((masks[0] ^ masks[1]).sum())


@given(st.lists(st.sampled_from([0.0, -1e-30, 1e-3, -2.0, 5.0]), min_size=1), st.data())
@settings(max_examples=50)
def test_lambda_zero_keeps_every_nonzero(values, data):
    delta = torch.tensor(values)
    merged = torch.tensor(data.draw(st.lists(st.floats(-9, 9), min_size=len(values), max_size=len(values))))
    assert torch.equal(task_mask(delta, merged.float(), 0.0), delta != 0)


def test_a_lone_expert_gets_its_own_weights_back():
    base, delta = torch.randn(5, 4), torch.randn(5, 4)
    mask = task_mask(delta, delta, 0.6)
    torch.testing.assert_close(base + signed_update(delta, mask), base + delta)


def test_projection_worked_by_hand():
    """A merge that took half of what the task had: γ = 25 / 12.5, whatever lies outside of the mask."""
    delta, used = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([True, True, False])
    assert projection_scale(delta, torch.tensor([1.5, 2.0, 7.0]), used) == 2.0
    assert projection_scale(delta, torch.tensor([-1.5, -2.0, 7.0]), used) == 1.0  # against it: left alone
    # Levels -1 and 2: (3 · 1.5 + 4 · 2 · 1) = 12.5.
    assert projection_scale(delta, torch.tensor([-1.5, 1.0, 7.0]), delta == 4, used) == 2.0
    assert projection_scale(delta, torch.ones(3), ~used) == 1.0


def test_factors_do_not_tell_how_many_threads_summed():
    """Last bits of a float64 sum depend on that; what is recorded must not."""
    delta = torch.tensor([1.0, 1.0])
    third = projection_scale(delta, torch.tensor([3.0, 3.0]), torch.tensor([True, True]))
    assert third == scale_factor(1.0, 3.0) == scale_factor(1.0, 3.0 * (1 + 1e-15)) == pytest.approx(1 / 3)


@given(st.lists(st.integers(0, 5), min_size=0, max_size=3), st.integers(0, 2**31))
@settings(max_examples=80)
def test_pack_and_unpack(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    packed = pack(mask)
    assert packed.dtype == torch.uint8 and len(packed) == (mask.numel() + 7) // 8
    assert torch.equal(unpack(packed, shape), mask)


def test_bit_order_is_the_documented_one():
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask.view(-1)[[0, 9]] = True
    assert pack(mask).tolist() == [0b1, 0b10]
    with pytest.raises(ValueError, match="does not hold a mask"):
        unpack(pack(mask), (5, 5))


def test_ratios_worked_by_hand():
    ratios = MaskRatios(3)
    ratios.add([torch.tensor(m, dtype=torch.bool) for m in ([1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 1])])
    ratios.add([torch.tensor([True])] * 3)
    assert ratios.keep_ratios == [3 / 5, 2 / 5, 3 / 5]
    assert ratios.selfish_ratio == 2 / 5


@pytest.mark.parametrize(("combine", "selfish", "keep"), [("arithmetic", 0.34, 0.49), ("ties", 0.73, 0.30)])
def test_unrelated_gaussian_experts_give_the_known_ratios(combine, selfish, keep):
    """Four iid Gaussian task vectors at λ = 0.6: a high selfish ratio alone is no sign of anything."""
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(200_000, generator=generator) for _ in range(4)]
    merged = (
        task_arithmetic(deltas, [1] * 4)
        if combine == "arithmetic"
        else ties(deltas, [1] * 4, [0.0] * 4, "sum")
    )
    ratios = MaskRatios(4)
    ratios.add([task_mask(delta, merged, 0.6) for delta in deltas])
    assert ratios.selfish_ratio == pytest.approx(selfish, abs=0.01)
    assert ratios.keep_ratios == pytest.approx([keep] * 4, abs=0.01)


def test_null_model_keeps_magnitudes_and_spectrum_but_no_alignment():
    generator = torch.Generator().manual_seed(0)
    update = LowRank(torch.randn(60, 4, generator=generator), torch.randn(4, 50, generator=generator))
    shuffled = unaligned(update, generator)
    before, after = update.dense(), shuffled.dense()
    torch.testing.assert_close(before.flatten().sort().values, after.flatten().sort().values)
    torch.testing.assert_close(update.svd().s, shuffled.svd().s)
    cosine = (before * after).sum() / before.square().sum()
    assert abs(cosine) < 0.1

    def selfish(second: LowRank) -> float:
        deltas = [update.dense(), second.dense()]
        merged, ratios = sum(deltas), MaskRatios(2)
        ratios.add([task_mask(delta, merged, 0.6) for delta in deltas])
        return ratios.selfish_ratio

    assert selfish(update) == 0.0 < 0.2 < selfish(shuffled), "identical experts share, shuffled ones do not"

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.kernels.attend import attend
from vla.policy.attention import masked_attention, two_call_attention
from vla.policy.masks import CoupledMask


def test_mask_is_the_one_in_the_docstring():
    expected = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    ).bool()
    assert torch.equal(CoupledMask(5, 3).dense[0, 0], expected)
    padded = CoupledMask(5, 3, torch.tensor([[True, False, True, True, True]])).dense[0, 0]
    expected[:, 1] = False
    assert torch.equal(padded, expected)


def test_mask_without_action_block_is_causal():
    assert torch.equal(CoupledMask(4, 4).dense[0, 0], torch.ones(4, 4).tril().bool())


def test_truth_table_of_catten():
    """Rows and columns of reference table 3 for [text text vision vision state action action]."""
    mask = CoupledMask(7, 5).dense[0, 0]
    text, vision, state, action = slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 7)
    causal = torch.ones(2, 2).tril().bool()
    assert torch.equal(mask[text, text], causal) and torch.equal(mask[vision, vision], causal)
    assert mask[vision, text].all() and mask[state, :4].all() and mask[action].all()
    assert not mask[:5, action].any() and not mask[text, vision].any() and not mask[:4, state].any()


def reference(q, k, v, mask):
    """Attention written out in fp64, one query at a time."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    dense = mask.dense.expand(len(q), 1, -1, -1)
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        keys = dense[b, 0, i]
        weights = torch.softmax(k[b, h, keys] @ q[b, h, i] / q.shape[-1] ** 0.5, 0)
        out[b, h, i] = weights @ v[b, h, keys]
    return out


@settings(max_examples=25)
@given(
    prefix=st.integers(1, 9),
    action=st.integers(0, 4),
    groups=st.sampled_from([1, 2, 4]),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_both_executions_equal_the_reference(prefix, action, groups, padded, seed):
    generator = torch.Generator().manual_seed(seed)
    length = prefix + action
    q = torch.randn(2, 4, length, 8, generator=generator)
    k, v = torch.randn(2, 2, groups, length, 8, generator=generator)
    valid = None
    if padded:
        valid = torch.rand(2, length, generator=generator) > 0.3
        valid[:, 0] = True
    mask = CoupledMask(length, prefix, valid)
    expected = reference(q, k, v, mask)
    for execute in (masked_attention, two_call_attention):
        torch.testing.assert_close(execute(q, k, v, mask).double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
def test_explicit_path_agrees_with_sdpa_forward_and_backward(groups):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 12, 16, requires_grad=True)
    k, v = torch.randn(2, 2, groups, 12, 16).requires_grad_()
    visible = CoupledMask(12, 9).dense
    plain = attend(q, k, v, visible)
    want = torch.autograd.grad(plain.square().sum(), q, retain_graph=True)[0]
    with torch.autocast("cpu", torch.bfloat16):  # the condition under which the explicit path runs
        explicit = attend(q, k, v, visible)
    got = torch.autograd.grad(explicit.float().square().sum(), q)[0]
    assert (explicit - plain).norm() / plain.norm() < 1e-2
    assert (got - want).norm() / want.norm() < 3e-2


def test_subsequence_keeps_its_action_block():
    mask = CoupledMask(10, 7).without(3, None)
    assert (mask.length, mask.prefix) == (7, 4)

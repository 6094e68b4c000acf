"""The bank: every row computes with its own expert, as that expert alone would; comings and goings leave
the others alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vla.errors import UserError
from vla.experts.bank import ExpertBank
from vla.experts.grouped_lora import add_grouped_lora, stack_updates
from vla.experts.lora_expert import LoraExpert, declare, make_config
from vla.experts.low_rank import LowRank

TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture
def experts(save_base, save_adapter):
    """Three adapters by PEFT that differ in rank, in layers and in what they trained in full."""
    base = save_base()
    options = {
        "pick": {"use_rslora": True, "modules_to_save": ["norm", "lm_head"]},
        "push": {"r": 2, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["input_layernorm"]},
        "turn": {"r": 6, "target_modules": ["v_proj", "up_proj"]},
    }
    found = {}
    for seed, (name, entries) in enumerate(options.items(), 1):
        folder, model = save_adapter(name, seed, **entries)
        declare(folder, name, base)
        found[name] = (LoraExpert.load(folder), model)
    return found


@pytest.fixture
def filled(experts, make_model):
    """The tiny model, and a bank of the three experts on it."""
    model = make_model()
    bank = ExpertBank(model)
    for expert, _ in experts.values():
        bank.add(expert)
    return model, bank


@torch.no_grad()
@settings(max_examples=60)
@given(
    ranks=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    k=st.integers(1, 3),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_grouped_equals_looped(ranks, sizes, k, seed, data):
    m, n, tokens = sizes
    rows = data.draw(st.lists(st.integers(0, len(ranks) - 1), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(seed)
    updates = [
        LowRank(torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)) for r in ranks
    ]
    x = torch.randn(k * len(rows), tokens, n, generator=generator)
    base = torch.randn(k * len(rows), tokens, m, generator=generator)
    stack = stack_updates(updates, torch.empty(m, n))
    grouped = add_grouped_lora(base, x, stack, torch.tensor(rows))
    looped = torch.stack([base[i] + x[i] @ updates[rows[i // k]].dense().T for i in range(len(x))])
    torch.testing.assert_close(grouped, looped, atol=1e-4, rtol=1e-4)
    assert (grouped is base) == (not any(ranks[row] for row in rows))


@torch.no_grad()
def test_every_row_answers_as_peft_does(experts, filled, make_model):
    model, bank = filled
    assert bank.names == ("pick", "push", "turn")
    order = [2, 0, 1, 0, 2]
    tokens = (torch.arange(30).view(5, 6) * 7) % 32
    with bank.rows(order):
        batched = model(tokens).logits
    for row, e in enumerate(order):
        alone = experts[bank.names[e]][1](tokens[row : row + 1]).logits[0]
        torch.testing.assert_close(batched[row], alone, atol=1e-5, rtol=1e-4)
        with bank.rows([e]):
            torch.testing.assert_close(model(tokens[row : row + 1]).logits[0], alone, atol=1e-5, rtol=1e-4)
    assert torch.equal(model(tokens).logits, make_model()(tokens).logits), "outside of rows it is the base"


@torch.no_grad()
def test_comings_and_goings(experts, filled, make_model):
    """After an expert left, the others answer as before; after all left, nothing of the bank remains."""
    model, bank = filled
    with bank.rows([0, 2]):
        before = model(TOKENS).logits
    bank.remove("push")
    assert bank.names == ("pick", "turn")
    with bank.rows([0, 1]):
        torch.testing.assert_close(model(TOKENS).logits, before, atol=1e-6, rtol=1e-5)
    assert bank.add(experts["push"][0]) == 2
    with bank.rows([2]):
        torch.testing.assert_close(
            model(TOKENS[:1]).logits, experts["push"][1](TOKENS[:1]).logits, atol=1e-5, rtol=1e-4
        )
    bank.detach()
    assert not bank.names and torch.equal(model(TOKENS).logits, make_model()(TOKENS).logits)
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


def test_a_misfit_leaves_the_bank_as_it_was(experts, filled):
    model, bank = filled
    with torch.no_grad(), bank.rows([0, 1]):
        before = model(TOKENS).logits

    def refused(sentence, tensors, ranks, full=()):
        with pytest.raises(UserError, match=sentence):
            bank.add(LoraExpert(make_config(ranks, 4, full_modules=full), tensors, source="odd"))
        assert bank.names == ("pick", "push", "turn")

    layer = "model.layers.0.self_attn.q_proj"
    good = {f"{layer}.lora_A.weight": torch.ones(2, 16), f"{layer}.lora_B.weight": torch.ones(16, 2)}
    wide = {f"{layer}.lora_A.weight": torch.ones(2, 17), f"{layer}.lora_B.weight": torch.ones(16, 2)}
    refused(r"of shape \(16, 17\), the base \(16, 16\)", wide, {layer: 2})
    norm = {name.replace("self_attn.q_proj", "input_layernorm"): value for name, value in good.items()}
    refused("not a linear layer", norm, {"model.layers.0.input_layernorm": 2})
    refused("'model.nrm.weight', which the base", good | {"model.nrm.weight": torch.ones(16)}, {layer: 2})
    refused(r"'model.norm.weight' of shape \(3,\)", good | {"model.norm.weight": torch.ones(3)}, {layer: 2})
    with pytest.raises(UserError, match="already has an expert 'pick'"):
        bank.add(experts["pick"][0])
    with pytest.raises(UserError, match=r"no expert 'pusch'\. Did you mean 'push'"):
        bank.remove("pusch")
    with pytest.raises(IndexError, match="0 to 2"), bank.rows([3]):
        pass
    with torch.no_grad(), bank.rows([0, 1]):
        assert torch.equal(model(TOKENS).logits, before)


class TwoCameras(nn.Module):
    """Two images per sample share the batch axis, and a bare parameter belongs to the model itself."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(4, 4)
        self.slots = nn.Parameter(torch.ones(4))

    def forward(self, images):
        return (self.encode(images.flatten(0, 1)).unflatten(0, images.shape[:2]) + self.slots).sum(1)


@torch.no_grad()
def test_rows_of_several_cameras_and_bare_parameters():
    torch.manual_seed(0)
    model = TwoCameras()
    bank = ExpertBank(model)
    updates, slots = [], []
    for seed, name in enumerate(("a", "b")):
        a, b = torch.randn(2, 4), torch.randn(4, 2)
        tensors = {
            "encode.lora_A.weight": a,
            "encode.lora_B.weight": b,
            "slots": torch.full((4,), seed + 5.0),
        }
        bank.add(LoraExpert(make_config({"encode": 2}, 2), tensors, source=name))
        updates.append(b @ a)
        slots.append(tensors["slots"])
    images, order = torch.randn(3, 2, 4), [1, 0, 1]
    with bank.rows(order):
        batched = model(images)
    for row, e in enumerate(order):
        weight = model.encode.weight + updates[e]
        expected = (images[row] @ weight.T + model.encode.bias + slots[e]).sum(0)
        torch.testing.assert_close(batched[row], expected)


class ReadsWeights(nn.Module):
    """Uses a child's weight without calling the child."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(4, 4)
        self.queries = nn.Embedding(2, 4)

    def forward(self, x):
        return self.encode(x) + self.queries.weight.sum(0)


@torch.no_grad()
def test_a_bypassed_private_module_is_an_error():
    model = ReadsWeights()
    bank = ExpertBank(model)
    tensors = {"encode.lora_A.weight": torch.ones(2, 4), "encode.lora_B.weight": torch.ones(4, 2)}
    bank.add(LoraExpert(make_config({"encode": 2}, 2), tensors, source="plain"))
    tensors = tensors | {"queries.weight": torch.ones(2, 4)}
    bank.add(LoraExpert(make_config({"encode": 2}, 2), tensors, source="own queries"))
    with bank.rows([0, 0]):
        model(torch.ones(2, 3, 4))
    with pytest.raises(RuntimeError, match="'queries'"), bank.rows([0, 1]):
        model(torch.ones(2, 3, 4))

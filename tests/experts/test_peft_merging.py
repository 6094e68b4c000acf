"""PEFT's `add_weighted_adapter` gives the same matrices wherever the methods coincide.

They coincide on the dense update: PEFT's ``cat`` and ``svd`` are task arithmetic, ``ties_svd`` is TIES with
per-tensor trimming, ``dare_linear_svd`` at density 1 is task arithmetic. They do not for ``linear``, ``ties``
and ``dare_*`` without ``_svd``: those merge A and B separately, which is no merge of the updates ``B A``
(``(ΣA_m)(ΣB_m)`` has cross terms between experts). DARE's random numbers come from torch's global generator
there and from (seed, expert, tensor) here, so only its statistics agree.
"""

import pytest
import torch

from vla.experts.lora_expert import LoraExpert
from vla.experts.merging.method import TensorContext
from vla.experts.merging.registry import make_method

WEIGHTS = (0.7, 1.5)
SQUARE_ENOUGH = ["q_proj", "up_proj", "down_proj"]
CASES = {
    "cat": ({}, "task_arithmetic", {}),
    "svd": ({}, "task_arithmetic", {}),
    "ties_svd": ({"density": 0.4}, "ties", {"density": 0.4, "trim": "tensor"}),
    "dare_linear_svd": ({"density": 1.0}, "dare", {"drop": 0.0}),
    "dare_ties_svd": ({"density": 1.0}, "dare", {"drop": 0.0, "then": "ties"}),
}


@pytest.fixture
def two_skills(save_adapter):
    """Two adapters of different rank and scale in one PEFT model, and the same as experts."""
    first, model = save_adapter("first", seed=1, target_modules=SQUARE_ENOUGH)
    second, _ = save_adapter("second", seed=2, r=3, use_rslora=True, target_modules=SQUARE_ENOUGH)
    model.load_adapter(second, "second")
    return model, [LoraExpert.load(first), LoraExpert.load(second)]


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("theirs", CASES)
def test_the_same_matrix_as_peft(two_skills, theirs):
    model, experts = two_skills
    extra, name, options = CASES[theirs]
    if theirs != "cat":
        extra = extra | {"svd_rank": 16}  # min(m, n) of these layers: no truncation
    model.add_weighted_adapter(["default", "second"], list(WEIGHTS), "merged", theirs, **extra)
    for module in experts[0].modules:
        layer = model.base_model.model.get_submodule(module)
        context = TensorContext(module, ("first", "second"), WEIGHTS)
        merged = make_method(name, options).merge([e.update(module) for e in experts], context)
        torch.testing.assert_close(merged, layer.get_delta_weight("merged"), atol=1e-5, rtol=1e-4)


def test_peft_linear_coincides_for_a_single_adapter_only(two_skills):
    model, experts = two_skills
    model.add_weighted_adapter(["default"], [0.7], "alone", "linear")
    model.add_weighted_adapter(["default", "default"], [0.5, 0.5], "twice", "linear")
    module = experts[0].modules[0]
    layer, own = model.base_model.model.get_submodule(module), experts[0].update(module).dense()
    torch.testing.assert_close(layer.get_delta_weight("alone"), 0.7 * own)
    # half of A and half of B, twice each: cross terms make twice the update out of what should be once
    torch.testing.assert_close(layer.get_delta_weight("twice"), 2 * own)

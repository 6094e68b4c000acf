"""Recipes: what is written is what is meant, and anything else is refused with a sentence."""

import pytest
import torch

from vla.errors import UserError
from vla.experts.merging.dare import Dare
from vla.experts.merging.emr import Emr
from vla.experts.merging.ties import Ties
from vla.experts.merging.wudi import Wudi
from vla.experts.recipe import load_recipe

WHOLE = """
version: 1
base: ../nano
experts:
  - pick
  - {path: push, weight: 2}
method: ties
options: {density: 0.3, combine: sum}
alpha: 0.5
lambda: 0.6
dtype: bfloat16
seed: 7
null_model: false
shared: ["head.*"]
private: ["head.out.*"]
overrides:
  "vision.*": {alpha: 2, lambda: null}
  "vision.late.*": {method: wudi, options: {learning_rate: 1e-4}}
  "text.*": {options: {density: 1.0}}
  "emr.*": {method: emr}
"""
SMALL = "version: 1\nbase: b\nexperts: [a]\nmethod: dare\n"


@pytest.fixture
def recipe(tmp_path):
    def load(text: str):
        (tmp_path / "recipe.yaml").write_text(text)
        return load_recipe(tmp_path / "recipe.yaml")

    return load


def test_everything_is_read(recipe, tmp_path):
    read = recipe(WHOLE)
    assert read.base == tmp_path / "../nano"
    assert [(entry.path.name, entry.weight) for entry in read.experts] == [("pick", 1.0), ("push", 2.0)]
    assert (read.dtype, read.seed, read.null_model) == (torch.bfloat16, 7, False)
    assert (read.default.method, read.default.alpha, read.default.lam) == (Ties(0.3, "sum"), 0.5, 0.6)
    early, late = read.setting("vision.0.weight"), read.setting("vision.late.weight")
    assert (early.method, early.alpha, early.lam, early.masked) == (read.default.method, 2.0, None, False)
    assert (late.method, late.alpha, late.lam) == (Wudi(learning_rate=1e-4), 0.5, 0.6)
    assert read.setting("text.weight").method == Ties(1.0, "sum")
    assert read.setting("emr.weight").method == Emr() and read.setting("emr.weight").masked
    assert read.setting("elsewhere") == read.default
    assert read.is_shared("head.in.weight") and not read.is_private("head.in.weight")
    assert read.is_private("head.out.weight") and not read.is_shared("head.out.weight")


def test_defaults(recipe):
    read = recipe(SMALL)
    assert (read.default.method, read.default.alpha, read.default.masked) == (Dare(), 1.0, False)
    assert (read.dtype, read.seed, read.null_model, read.globs) == (None, 0, True, ())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[", "is not valid YAML"),
        ("- a", "must be a mapping"),
        ("version: 1\nbase: b\n", "experts, method are missing"),
        (SMALL.replace("version: 1", "version: 2"), "version 2, this release reads 1"),
        (SMALL + "lamda: 1\n", r"no entry 'lamda'\. Did you mean 'lambda'\?"),
        (SMALL + "method: ties\n", "the key 'method' is given twice"),
        (SMALL.replace("[a]", "[]"), "at least one folder"),
        (SMALL.replace("[a]", "[{weight: 2}]"), "has no path"),
        (SMALL.replace("[a]", "[{path: a, weight: much}]"), "weight is 'much'; a finite number"),
        (SMALL.replace("dare", "dear"), r"no merging method 'dear'\. Did you mean 'dare'\?"),
        (SMALL + "options: {density: 1}\n", "'dare' has no option 'density'"),
        (SMALL + "alpha: .inf\n", "alpha is inf; a finite number"),
        (SMALL + "lambda: -1\n", "lambda is -1.0; it must be 0 or more"),
        (SMALL.replace("dare", "emr") + "lambda: 0.6\n", "has its own masks and takes no lambda"),
        (SMALL + "rescale: true\n", "the method 'dare' has no masks here; give a lambda"),
        (SMALL.replace("dare", "emr") + "rescale: true\n", "the method 'emr' rescales in its own way"),
        (SMALL + "lambda: 0.6\nrescale: 1.5\n", "rescale is 1.5; a true or false is needed"),
        (SMALL + "dtype: float8\n", "dtype is 'float8'; choose from base"),
        (SMALL + "seed: true\n", "seed is True; a whole number"),
        (SMALL + "shared: head\n", "shared is 'head'; a list"),
        (SMALL + "overrides: {x: {seed: 1}}\n", "the override 'x' has no entry 'seed'"),
        (SMALL + "overrides: {x: {method: ties, options: {drop: 0.1}}}\n", "'ties' has no option 'drop'"),
    ],
)
def test_refusals(recipe, text, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        recipe(text)
    assert "recipe.yaml" in str(refused.value) and "\n" not in str(refused.value)


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="There is no recipe"):
        load_recipe(tmp_path / "none.yaml")

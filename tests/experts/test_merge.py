"""The streamed merge: the same numbers as in memory, the same bits twice, whole or not at all."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from vla import cli
from vla.errors import UserError
from vla.experts.lora_expert import LoraExpert, declare, make_config
from vla.experts.low_rank import LowRank
from vla.experts.merge import merge
from vla.experts.merge_update import updated_recipe
from vla.experts.merged import MergedCheckpoint
from vla.experts.merging.method import TensorContext
from vla.experts.merging.registry import METHODS
from vla.experts.recipe import load_recipe
from vla.experts.task_masks import task_mask, unpack

SHAPES = {"model.a": (12, 9), "model.b": (8, 14), "model.c": (7, 6)}
HEAD = {"head.trunk.weight": (4, 9), "head.trunk.bias": (4,), "head.out.weight": (2, 4)}
NAMES = ("pick", "push", "turn")


def random(seed, shape, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def write_base(folder, seed=0):
    folder.mkdir()
    tensors = {f"{name}.weight": random(seed + i, shape) for i, (name, shape) in enumerate(SHAPES.items())}
    tensors["model.c.weight"] = tensors["model.c.weight"].bfloat16()
    tensors |= {name: random(seed + 20 + i, shape) for i, (name, shape) in enumerate(HEAD.items())}
    tensors |= {"model.norm.weight": random(seed + 40, 9), "steps": torch.tensor(7)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"type": "toy"}')
    (folder / "manifest.json").write_text('{"choice": "last step", "seed": 1}')
    return folder


def write_expert(folder, base, seed, modules=tuple(SHAPES), head_seed=5, head=True):
    ranks = {module: 2 + i for i, module in enumerate(modules)}
    tensors = {}
    for i, (module, rank) in enumerate(ranks.items()):
        m, n = SHAPES[module]
        tensors[f"{module}.lora_A.weight"] = random(seed * 100 + i, (rank, n))
        tensors[f"{module}.lora_B.weight"] = random(seed * 100 + 50 + i, (m, rank), 0.1)
    if head:
        tensors |= {name: random(seed * 100 + 70, shape) for name, shape in HEAD.items()}
    full = ("head.trunk", "head.out") if head else ()
    LoraExpert(make_config(ranks, alpha=4, full_modules=full), tensors).save(folder)
    declare(folder, folder.name, base, head_seed)
    return folder


@pytest.fixture
def scene(tmp_path):
    """A base in two dtypes and three experts; the third left one tensor alone."""
    base = write_base(tmp_path / "base")
    for i, name in enumerate(NAMES):
        write_expert(tmp_path / name, base, i + 1, tuple(SHAPES)[: 2 if name == "turn" else 3])
    return tmp_path


def run(folder, out="out", **entries):
    recipe = {"version": 1, "base": "base", "experts": list(NAMES), "method": "task_arithmetic"}
    recipe |= {"shared": ["head.trunk.*"], "private": ["head.out.*"]} | entries
    (folder / f"{out}.yaml").write_text(yaml.safe_dump(recipe))
    merge(load_recipe(folder / f"{out}.yaml"), folder / out)
    return folder / out


def updates_of(scene, module):
    experts = [LoraExpert.load(scene / name) for name in NAMES]
    return [e.update(module) if module in e.modules else LowRank.zero(SHAPES[module]) for e in experts]


@pytest.mark.parametrize("name", METHODS)
def test_streamed_equals_in_memory(scene, name):
    """The same pure functions on everything at once; TIES' global threshold by sorting the whole vector."""
    own = {
        "emr": lambda d, merged: d * merged > 0,
        "least_squares": lambda d, merged: task_mask(d, merged, 1.0),
    }
    masks = {} if name in own else {"lambda": 0.6}
    out = run(scene, method=name, alpha=0.8, seed=3, **masks)
    base, merged, delta = (
        load_file(scene / p)
        for p in ("base/model.safetensors", "out/model.safetensors", "out/delta.safetensors")
    )
    packed = [load_file(out / "experts" / expert / "mask.safetensors") for expert in NAMES]
    everything = {module: updates_of(scene, module) for module in SHAPES}

    vectors = [torch.cat([u[m].dense().flatten() for u in everything.values()]).abs() for m in range(3)]
    thresholds = [v.sort(descending=True).values[int(0.2 * len(v)) - 1].item() for v in vectors]

    for module, updates in everything.items():
        tensor, method = f"{module}.weight", METHODS[name]()
        context = TensorContext(tensor, NAMES, (1.0, 1.0, 1.0), 3, SimpleNamespace(thresholds=thresholds))
        expected = 0.8 * method.merge(updates, context)
        dtype = base[tensor].dtype
        assert torch.equal(merged[tensor], (base[tensor].float() + expected).to(dtype))
        assert torch.equal(delta[tensor], expected.to(dtype))
        for update, stored in zip(updates, packed, strict=True):
            dense = update.dense()
            mask = own.get(name, lambda d, merged: task_mask(d, merged, 0.6))(dense, expected)
            assert torch.equal(unpack(stored[tensor], SHAPES[module]), mask)


def test_the_result_is_an_ordinary_checkpoint(scene):
    out = run(scene)
    base, merged = load_file(scene / "base/model.safetensors"), load_file(out / "model.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in base.items()} == {
        k: (v.dtype, v.shape) for k, v in merged.items()
    }
    assert all(
        torch.equal(base[name], merged[name]) for name in ("model.norm.weight", "steps", "head.out.weight")
    )
    trunk = torch.stack(
        [
            load_file(scene / n / "adapter_model.safetensors")["base_model.model.head.trunk.bias"]
            for n in NAMES
        ]
    )
    torch.testing.assert_close(merged["head.trunk.bias"], trunk.mean(0))
    assert (out / "config.json").read_bytes() == (scene / "base/config.json").read_bytes()
    assert json.loads((out / "manifest.json").read_text())["choice"] == "merged"
    assert not (out / "delta.safetensors").exists()


def test_merging_one_peft_adapter_is_merging_it_in_peft(save_base, save_adapter, make_model, tmp_path):
    """The written folder loads in transformers and answers as PEFT does."""
    base, (folder, model) = save_base("base"), save_adapter("pick", use_rslora=True)
    declare(folder, "pick", base)
    out = run(tmp_path, experts=["pick"], shared=[], private=[])
    merged = type(make_model()).from_pretrained(out).eval()
    tokens = torch.arange(6)[None]
    torch.testing.assert_close(merged(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_merge_finds_its_base_where_both_were_moved(scene, tmp_path_factory):
    out = run(scene, **{"lambda": 0.6})
    before = dict(MergedCheckpoint.open(out).task_weights("pick"))
    moved = shutil.move(scene, tmp_path_factory.mktemp("elsewhere") / "scene")
    merged = MergedCheckpoint.open(moved / "out")
    assert merged.base == (moved / "base").resolve()
    after = dict(merged.task_weights("pick"))
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)
    (moved / "base").rename(moved / "gone")
    with pytest.raises(UserError, match=r"is not the base that .*out was merged from; put that back"):
        MergedCheckpoint.open(moved / "out")


def test_second_run_gives_the_same_bits(scene):
    options = {"method": "dare", "lambda": 0.6, "overrides": {"model.b.*": {"method": "wudi"}}}
    first, second = run(scene, **options), run(scene, "again", **options)
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    other = run(scene, "other_seed", **options, seed=1)
    assert (other / "model.safetensors").read_bytes() != (first / "model.safetensors").read_bytes()


def test_task_weights(scene):
    out = run(scene, **{"lambda": 0.6, "overrides": {"model.b.*": {"lambda": None}}})
    merged = MergedCheckpoint.open(out)
    base = load_file(scene / "base/model.safetensors")
    for m, name in enumerate(NAMES):
        weights = dict(merged.task_weights(name))
        assert set(weights) == {"model.a.weight", "model.c.weight", "head.out.weight"}
        updates = updates_of(scene, "model.a")
        tau = sum(u.dense() for u in updates)
        expected = base["model.a.weight"] + task_mask(updates[m].dense(), tau, 0.6) * tau
        torch.testing.assert_close(weights["model.a.weight"], expected)
        own = load_file(scene / name / "adapter_model.safetensors")["base_model.model.head.out.weight"]
        assert torch.equal(weights["head.out.weight"], own)
    # an expert that left a tensor alone gets the base there
    assert torch.equal(dict(merged.task_weights("turn"))["model.c.weight"], base["model.c.weight"])
    with pytest.raises(UserError, match=r"no expert 'trun'\. Did you mean 'turn'\?"):
        list(merged.task_weights("trun"))


def test_a_single_masked_expert_is_itself(scene):
    for method in ("ties", "emr", "least_squares"):
        options = (
            {"method": method}
            if method != "ties"
            else {"method": method, "lambda": 0.6, "options": {"density": 1.0}}
        )
        out = run(scene, experts=["pick"], **options)
        weights = dict(MergedCheckpoint.open(out).task_weights("pick"))
        expert, base = LoraExpert.load(scene / "pick"), load_file(scene / "base/model.safetensors")
        for module in ("model.a", "model.b"):
            torch.testing.assert_close(
                weights[f"{module}.weight"], base[f"{module}.weight"] + expert.update(module).dense()
            )


def test_emr_restores_each_experts_magnitude(scene):
    """``γ_m`` makes the masked vector as large, in absolute sum over all tensors, as the expert's own."""
    out = run(scene, method="emr", dtype="float32")
    merged, base = MergedCheckpoint.open(out), load_file(scene / "base/model.safetensors")
    for m, name in enumerate(NAMES):
        weights = dict(merged.task_weights(name))
        used = sum((weights[f"{k}.weight"] - base[f"{k}.weight"].float()).abs().sum() for k in SHAPES)
        own = sum(updates_of(scene, k)[m].dense().abs().sum() for k in SHAPES)
        torch.testing.assert_close(used, own, rtol=1e-4, atol=0)


def test_rescaling_restores_each_update_along_itself(scene):
    """Tensor by tensor, the masked update's part along the expert's own is that, and nothing else changes."""
    plain = run(scene, "plain", **{"lambda": 0.6, "dtype": "float32"})
    out = run(scene, **{"lambda": 0.6, "rescale": True, "dtype": "float32"})
    assert (out / "delta.safetensors").read_bytes() == (plain / "delta.safetensors").read_bytes()
    base = load_file(scene / "base/model.safetensors")
    for m, name in enumerate(NAMES):
        ours, theirs = (dict(MergedCheckpoint.open(folder).task_weights(name)) for folder in (out, plain))
        for module in SHAPES:
            start, own = base[f"{module}.weight"].float(), updates_of(scene, module)[m].dense()
            rescaled, masked = ours[f"{module}.weight"] - start, theirs[f"{module}.weight"] - start
            if not own.any():  # the expert left it alone
                assert not rescaled.any() and not masked.any()
                continue
            torch.testing.assert_close((rescaled * own).sum(), own.square().sum(), rtol=1e-4, atol=0)
            assert torch.nn.functional.cosine_similarity(rescaled.ravel(), masked.ravel(), dim=0) > 0.9999
    assert MergedCheckpoint.open(out).hash != MergedCheckpoint.open(plain).hash


def test_masks_of_two_bits(scene):
    """What the files say, entry by entry: base plus the merge, minus it, plus twice it, or nothing."""
    out = run(scene, method="least_squares", options={"bits": 2}, dtype="float32")
    base, delta = load_file(scene / "base/model.safetensors"), load_file(out / "delta.safetensors")
    seen = set()
    for m, name in enumerate(NAMES):
        weights = dict(MergedCheckpoint.open(out).task_weights(name))
        for module, shape in SHAPES.items():
            tensor = f"{module}.weight"
            files = [out / f"experts/{name}/{file}.safetensors" for file in ("mask", "negated")]
            first, second = (unpack(load_file(file)[tensor], shape) for file in files)
            level = torch.tensor([[0.0, -1.0], [1.0, 2.0]])[first.long(), second.long()]
            seen |= set(level.unique().tolist())
            torch.testing.assert_close(weights[tensor], base[tensor].float() + level * delta[tensor])
            own = updates_of(scene, module)[m].dense()
            assert (level * delta[tensor] * own >= 0).all(), "a task uses nothing against its own direction"
    assert seen == {-1.0, 0.0, 1.0, 2.0}
    manifest = json.loads((out / "merge.json").read_text())
    assert {f"experts/{name}/negated.safetensors" for name in NAMES} < set(manifest["outputs"])
    keep = manifest["masks"]["experts"]["keep"]["pick"]
    plus = run(scene, "plus", method="least_squares", dtype="float32")
    assert keep > json.loads((plus / "merge.json").read_text())["masks"]["experts"]["keep"]["pick"]
    assert not (plus / "experts/pick/negated.safetensors").exists()


def test_an_override_without_masks_is_not_rescaled(scene):
    overrides = {"model.a.*": {"lambda": None}, "model.b.*": {"method": "emr"}}
    manifest = MergedCheckpoint.open(
        run(scene, rescale=True, overrides=overrides, **{"lambda": 0.6})
    ).manifest
    assert {tuple(factors) for factors in manifest["rescale"]["per_tensor"].values()} == {("model.c.weight",)}
    assert manifest["rescale"]["tensors"] == ["model.b.weight"]


def test_merges_of_the_release_before_are_read(scene):
    out = run(scene, **{"lambda": 0.6})
    weights = dict(MergedCheckpoint.open(out).task_weights("push"))
    manifest = json.loads((out / "merge.json").read_text()) | {"version": 1}
    del manifest["rescale"]["per_tensor"]
    (out / "merge.json").write_text(json.dumps(manifest))
    again = dict(MergedCheckpoint.open(out).task_weights("push"))
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_private_lora_stays_whole(scene):
    out = run(scene, private=["head.out.*", "model.c.*"], **{"lambda": 0.6})
    weights = dict(MergedCheckpoint.open(out).task_weights("push"))
    base = load_file(scene / "base/model.safetensors")["model.c.weight"]
    own = base.float() + LoraExpert.load(scene / "push").update("model.c").dense()
    assert torch.equal(weights["model.c.weight"], own.bfloat16())
    assert "model.c.weight" not in dict(MergedCheckpoint.open(out).task_weights("turn"))


def test_manifest_accounts_for_everything(scene):
    out = run(scene, **{"lambda": 0.6, "dtype": "float32"})
    manifest = json.loads((out / "merge.json").read_text())

    def sha(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    assert manifest["recipe"] == sha(out / "recipe.yaml") == sha(scene / "out.yaml")
    assert manifest["base"]["sha256"] == sha(scene / "base/model.safetensors")
    assert (
        manifest["outputs"] == {str(p.relative_to(out)): sha(p) for p in out.rglob("*.safetensors")}
        and len(manifest["outputs"]) == 8
    )
    for entry in manifest["experts"]:
        assert entry["adapter_model.safetensors"] == sha(scene / entry["name"] / "adapter_model.safetensors")
    assert manifest["tensors"] == {"averaged": 2, "private": 1, "merged": 3, "copied": 2}
    masks = [load_file(out / f"experts/{name}/mask.safetensors")["model.b.weight"] for name in NAMES]
    assert all(0 < unpack(mask, SHAPES["model.b"]).float().mean() < 1 for mask in masks)
    assert (
        set(manifest["masks"]["experts"]["keep"])
        == set(manifest["masks"]["null_model"]["keep"])
        == set(NAMES)
    )
    assert {v.dtype for k, v in load_file(out / "model.safetensors").items() if k != "steps"} == {
        torch.float32
    }


def test_null_model_tells_twins_from_strangers(scene):
    """Experts with a common update share their weights; the same experts shuffled do not."""
    tensors = load_file(scene / "pick/adapter_model.safetensors")
    save_file(tensors, scene / "push/adapter_model.safetensors")
    out = run(scene, experts=["pick", "push"], **{"lambda": 0.6})
    masks = json.loads((out / "merge.json").read_text())["masks"]
    assert masks["experts"]["selfish"] == 0 < 0.2 < masks["null_model"]["selfish"]


def test_whole_or_not_at_all(scene):
    """A value that is not finite, met in the last tensor, leaves the earlier merge and no debris."""
    out = run(scene)
    before = (out / "model.safetensors").read_bytes()
    path = scene / "push/adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.c.lora_A.weight"][0, 0] = torch.inf
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"not finite in 'model.c'"):
        run(scene)
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in scene.iterdir()) == sorted([*NAMES, "base", "out", "out.yaml"])


def test_heads_that_started_from_the_base_share_their_start(scene):
    for seed, name in enumerate(("plain", "other")):
        write_expert(scene / name, scene / "base", seed, head_seed=None)
    run(scene, "merged", experts=["plain", "other"])
    with pytest.raises(UserError, match="head seeds are plain none, pick 5"):
        run(scene, "refused", experts=["plain", "pick"])


def test_misfits_are_refused(scene):
    def refused(sentence, **entries):
        with pytest.raises(UserError, match=sentence):
            run(scene, "refused", **entries)
        assert not (scene / "refused").exists()

    refused("matches no tensor that an expert changed", private=["head.out.*", "head.nut.*"])
    refused("'head.trunk.bias' was trained in full", shared=["head.trunk.weight"])
    refused("takes no weights", method="tsv_m", experts=[{"path": "pick", "weight": 2.0}, "push"])
    refused("Two experts are named 'pick'", experts=["pick", "pick"])
    refused("cannot be shared", shared=["head.trunk.*", "model.a.*"])
    write_expert(scene / "odd", scene / "base", 9, head_seed=6)
    refused("head seeds are pick 5, odd 6", experts=["pick", "odd"])
    run(scene, "private_heads", experts=["pick", "odd"], shared=[], private=["head.*"])
    write_expert(scene / "headless", scene / "base", 9, head=False)
    refused("the expert 'headless' lacks it", experts=["pick", "headless"])
    other = write_base(scene / "other", seed=1)
    write_expert(scene / "stranger", other, 9)
    refused("'stranger'.*was trained on base", experts=["pick", "stranger"])
    with pytest.raises(UserError, match="exists and is not an earlier merge"):
        run(scene, "other")
    with pytest.raises(UserError, match="one of the recipe's inputs"):
        run(scene, "pick")


def test_an_expert_of_another_model_is_refused(scene, monkeypatch):
    monkeypatch.setitem(SHAPES, "model.a", (12, 10))
    write_expert(scene / "wide", scene / "base", 9)
    with pytest.raises(UserError, match=r"of shape \(12, 10\), the base \(12, 9\)"):
        run(scene, experts=["wide"])
    monkeypatch.setitem(SHAPES, "model.aa", (12, 9))
    write_expert(scene / "other_names", scene / "base", 9, ("model.aa",))
    with pytest.raises(UserError, match=r"'model.aa.weight', which the base does not have\. Did you mean"):
        run(scene, experts=["other_names"])


def test_task_weights_need_the_right_base(scene):
    out = run(scene, **{"lambda": 0.6})
    write_base(scene / "other", seed=1)
    with pytest.raises(UserError, match="is not the base"):
        MergedCheckpoint.open(out, scene / "other")
    with pytest.raises(UserError, match="not a merged checkpoint"):
        MergedCheckpoint.open(scene / "base")


def test_the_command(scene, capsys):
    out = run(scene, **{"lambda": 0.6})
    assert cli.run(["merge", str(scene / "out.yaml"), "--out", str(scene / "by_command")]) == 0
    assert (scene / "by_command/merge.json").read_bytes() == (out / "merge.json").read_bytes()
    said = capsys.readouterr().out
    assert "3 merged" in said and all(f"{name} keeps" in said for name in NAMES) and "null model" in said
    assert cli.run(["merge", str(scene / "out.yaml"), "--out", str(scene / "base")]) == 2
    assert cli.run(["merge", str(scene / "nowhere.yaml"), "--out", str(scene / "x")]) == 2
    assert "There is no recipe" in capsys.readouterr().err


def tensors_of(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.suffix != ".yaml" and p.is_file()
    }


def weights_of(folder):
    return {name: data for name, data in tensors_of(folder).items() if name.endswith("safetensors")}


def test_adding_and_removing_is_merging_anew(scene, capsys):
    """The same bits in every file but for the recipe's wording, and the wording merges to the same again."""
    options = {"method": "ties", "lambda": 0.6, "seed": 4, "overrides": {"model.b.*": {"method": "dare"}}}
    wanted = run(scene, "anew", **options)
    out = run(scene, experts=list(NAMES[:2]), **options)
    first = weights_of(out)
    (scene / "out.yaml").unlink()
    assert cli.run(["merge", str(out), "--add", str(scene / "turn")]) == 0
    assert "3 merged" in capsys.readouterr().out

    def same(one, other):
        left, right = tensors_of(one), tensors_of(other)
        own = ("merge.json", "manifest.json")  # name the recipe by its hash
        assert left.keys() == right.keys()
        assert all(left[name] == right[name] for name in left if name not in own)
        facts = [
            json.loads((folder / "merge.json").read_text()) | {"recipe": None} for folder in (one, other)
        ]
        assert facts[0] == facts[1]

    same(out, wanted)
    merge(load_recipe(out / "recipe.yaml"), scene / "again")
    assert tensors_of(scene / "again") == tensors_of(out)
    assert cli.run(["merge", str(out), "--remove", "turn", "--out", str(scene / "less")]) == 0
    assert weights_of(scene / "less") == first
    same(out, wanted)


def test_a_training_run_means_its_newest_checkpoint(scene):
    """Of the base and of experts, in a recipe and in --add: as `vla bank` and `vla eval` read them."""
    expected = weights_of(run(scene, "expected"))
    for name in ("base", *NAMES):
        checkpoints = scene / "runs" / name / "checkpoints"
        (checkpoints / "000002").mkdir(parents=True)
        (scene / name).rename(checkpoints / "000002" / "pretrained_model")
        (checkpoints / "last").symlink_to("000002")
    first, *_, last = (f"runs/{name}" for name in NAMES)
    out = run(scene, base="runs/base", experts=[first, {"path": "runs/push"}])
    assert cli.run(["merge", str(out), "--add", str(scene / last)]) == 0
    assert weights_of(out) == expected


def test_an_exchange_keeps_weights(scene):
    out = run(scene, method="weighted_average", experts=[{"path": "pick", "weight": 3.0}, "push"])
    recipe = updated_recipe(out, [scene / "turn"], ["push"])
    assert [(entry.path.name, entry.weight) for entry in recipe.experts] == [("pick", 3.0), ("turn", 1.0)]
    assert recipe.base == (scene / "base").resolve() and recipe.shared == ("head.trunk.*",)


def test_updates_that_cannot_be(scene):
    out = run(scene)
    with pytest.raises(UserError, match=r"no expert 'trun' to remove\. Did you mean 'turn'"):
        updated_recipe(out, [], ["trun"])
    with pytest.raises(UserError, match="Nobody would be left"):
        updated_recipe(out, [], NAMES)
    with pytest.raises(UserError, match="is not a merged checkpoint"):
        updated_recipe(scene / "base", [scene / "turn"], [])
    with pytest.raises(UserError, match="Two experts are named 'pick'"):
        merge(updated_recipe(out, [scene / "pick"], []), out)
    write_expert(scene / "push", scene / "base", 77)
    with pytest.raises(UserError, match=r"'push' of .* is gone from .* or has changed"):
        updated_recipe(out, [], ["turn"])
    assert updated_recipe(out, [], ["push"]).experts[1].path.name == "turn"
    (out / "recipe.yaml").write_text("version: 1")
    with pytest.raises(UserError, match="is not the recipe that"):
        updated_recipe(out, [], ["push"])
    assert cli.run(["merge", str(scene / "out.yaml")]) == 2

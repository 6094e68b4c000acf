"""A bank on disk: experts come and go without a byte of the others changing; what does not fit is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from vla import cli
from vla.contract import Camera, Interface, PolicyContract, Vector
from vla.errors import UserError
from vla.experts.bank import ExpertBank
from vla.experts.bank_folder import BankFolder
from vla.experts.lora_expert import declare


def contract(rate=20.0, mean=0.0):
    action = Vector("action", ("x", "y"))
    interface = Interface((Camera("observation.images.image", 8, 8),), None, action, "joint_position", rate)
    return PolicyContract(interface, 4, 4, {"action": "MEAN_STD"}, {"action": {"mean": [mean, mean]}})


@pytest.fixture
def scene(tmp_path, save_base, save_adapter):
    """A base with a contract and three experts beside each other."""
    base = save_base()
    contract().save(base)
    for seed, name in enumerate(("pick", "push", "turn"), 1):
        folder, _ = save_adapter(name, seed)
        declare(folder, name, base, instructions=(f"{name} the cube",))
    return tmp_path


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_expert_comes_and_goes(scene):
    bank = BankFolder.create(scene / "bank", scene / "base", [scene / "pick", scene / "push"])
    before = content(scene / "bank")
    grown = bank.add(scene / "turn")
    assert grown.names == ("pick", "push", "turn") and grown.hash != bank.hash
    after = content(scene / "bank")
    unchanged = [path for path in before if path.name != "bank.json"]
    assert len(unchanged) == 6 and all(before[path] == after[path] for path in unchanged)
    assert after.keys() - before.keys() == {path for path in after if "turn" in path.parts}
    shrunk = BankFolder.open(scene / "bank").remove("turn")
    assert content(scene / "bank") == before and shrunk.hash == bank.hash
    assert BankFolder.open(scene / "bank").experts()[1].card.instructions == ("push the cube",)


def test_bank_and_base_move_together(scene):
    BankFolder.create(scene / "here" / "bank", scene / "base", [scene / "pick"])
    shutil.copytree(scene / "base", scene / "there" / "base")
    shutil.move(scene / "here" / "bank", scene / "there" / "deep" / "bank")
    with pytest.raises(UserError, match=r"stands on the base .*/there/base, which is not there") as missing:
        shutil.move(scene / "there" / "base", scene / "there" / "elsewhere")
        BankFolder.open(scene / "there" / "deep" / "bank")
    assert "move it back" in str(missing.value)
    named = BankFolder.open(scene / "there" / "deep" / "bank", scene / "there" / "elsewhere")
    named.verify()
    shutil.move(scene / "there" / "elsewhere", scene / "there" / "base")
    BankFolder.open(scene / "there" / "deep" / "bank").verify()


@torch.no_grad()
def test_the_folders_experts_are_the_ones_trained(scene, save_adapter, make_model):
    bank = BankFolder.create(scene / "bank", scene / "base", [scene / "push", scene / "pick"])
    model = make_model()
    live = ExpertBank(model)
    for expert in bank.experts():
        live.add(expert)
    tokens = torch.arange(6)[None]
    _, pick = save_adapter("again", 1)
    with live.rows([1]):
        torch.testing.assert_close(model(tokens).logits, pick(tokens).logits, atol=1e-5, rtol=1e-4)


def test_misfits_are_refused(scene, save_adapter, save_base):
    bank = BankFolder.create(scene / "bank", scene / "base", [scene / "pick"])
    before = content(scene / "bank")

    def refused(sentence, folder):
        with pytest.raises(UserError, match=sentence):
            bank.add(folder)
        assert content(scene / "bank") == before

    refused("already has an expert 'pick'", scene / "pick")
    foreign, _ = save_adapter("foreign", 4)
    refused("does not say which base", foreign)
    declare(foreign, "foreign", save_base("other", torch.bfloat16))
    refused("was trained on base", foreign)
    declare(foreign, "../foreign", scene / "base")
    refused("is no folder name", foreign)
    declare(foreign, "foreign", scene / "base")
    contract(rate=10.0).save(foreign)
    refused("differs from its base in interface", foreign)
    contract(mean=3.0).save(foreign)
    assert bank.add(foreign).experts()[1].contract.statistics["action"]["mean"] == [3.0, 3.0]
    with pytest.raises(UserError, match=r"no expert 'pusch'.*It has: pick"):
        bank.remove("pusch")
    with pytest.raises(UserError, match="is not an empty folder"):
        BankFolder.create(scene / "bank", scene / "base")
    with pytest.raises(UserError, match="was trained on base"):
        BankFolder.create(scene / "half", scene / "other", [scene / "pick"])
    assert not (scene / "half").exists()


def test_a_changed_file_is_found(scene):
    bank = BankFolder.create(scene / "bank", scene / "base", [scene / "pick"])
    bank.verify()
    path = scene / "bank/experts/pick/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 99}))
    with pytest.raises(UserError, match=r"pick/adapter_config\.json is not what the bank"):
        bank.verify()
    (scene / "bank/bank.json").write_text('{"version": 1, "experts": []}')
    with pytest.raises(UserError, match=r"bank\.json is malformed"):
        BankFolder.open(scene / "bank")
    with pytest.raises(UserError, match="is not a bank"):
        BankFolder.open(scene / "base")


def test_the_commands(scene, capsys):
    bank = str(scene / "bank")
    pick, push = str(scene / "pick"), str(scene / "push")
    assert cli.run(["bank", "create", bank, "--base", str(scene / "base"), "--experts", pick]) == 0
    assert cli.run(["bank", "add", bank, push, "--instructions", "push it", "push it hard"]) == 0
    said = capsys.readouterr().out
    assert "2 experts" in said and "push: 14 LoRA layers, 2 instructions" in said
    assert BankFolder.open(scene / "bank").experts()[1].card.instructions == ("push it", "push it hard")
    run = scene / "run/checkpoints/last/pretrained_model"
    shutil.copytree(scene / "turn", run)
    assert cli.run(["bank", "add", bank, str(scene / "run")]) == 0 and "turn: 14" in capsys.readouterr().out
    assert cli.run(["bank", "remove", bank, "turn"]) == 0
    assert cli.run(["bank", "remove", bank, "pick"]) == 0
    assert BankFolder.open(scene / "bank").names == ("push",)
    weights = load_file(scene / "bank/experts/push/adapter_model.safetensors")
    assert weights.keys() == load_file(scene / "push/adapter_model.safetensors").keys()
    assert cli.run(["bank", "remove", bank, "pick"]) == 2
    assert "has no expert 'pick'" in capsys.readouterr().err

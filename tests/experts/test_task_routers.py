"""Task routers: what they score, against formulas done by hand; when they abstain; what they refuse."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_skills import observation, save_tiny_base, save_tiny_expert

from vla.errors import UserError
from vla.experts.bank_folder import BankFolder
from vla.experts.bank_policy import BankPolicy
from vla.experts.expert_policy import load_expert_policy
from vla.experts.lora_expert import LoraExpert
from vla.experts.task_routers import TASK_ROUTERS, make_task_router
from vla.experts.task_routers.confusion import Confusion, Verdict
from vla.experts.task_routers.probe import Probe, fit_probe, load_features, save_features
from vla.experts.task_routers.router import RouterSettings

NAMES = ("soup", "drawer", "stove")
SETTINGS = RouterSettings()


@pytest.fixture(scope="module")
def bank(skills, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank") / "bank"
    return BankPolicy.load(BankFolder.create(folder, skills / "base", [skills / name for name in NAMES]))


def test_the_oracle_is_told(bank):
    oracle = make_task_router("oracle", bank, SETTINGS)
    decision = oracle.route(observation(), "drawer")
    assert decision.expert == 1 and decision.margin == 1.0 and not decision.abstained
    with pytest.raises(UserError, match="which expert 'pick up the soup"):
        oracle.route(observation())
    with pytest.raises(UserError, match=r"no expert 'drawr'\. Did you mean 'drawer'"):
        oracle.route(observation(), "drawr")


def test_language_finds_the_instruction(bank):
    router = make_task_router("language", bank, SETTINGS)
    for expert, texts in enumerate(bank.instructions):
        for text in texts:
            decision = router.route(observation(0, text))
            assert decision.expert == expert and not decision.abstained
            assert decision.scores[expert] == pytest.approx(1.0, abs=1e-5)
    assert router.route(observation(0, "open the top drawer")).expert == 1


def test_language_scores_by_hand(bank):
    known = [[bank.embed_instruction(text).double() for text in texts] for texts in bank.instructions]
    flat = [row for rows in known for row in rows]
    mean = sum(flat) / len(flat)
    asked = bank.embed_instruction("open the stove").double() - mean
    expected = [
        max(float(asked @ (row - mean) / (asked.norm() * (row - mean).norm())) for row in rows)
        for rows in known
    ]
    scores = make_task_router("language", bank, SETTINGS).scores(observation(0, "open the stove"))
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-5)


def test_language_abstains_between_experts_that_know_the_same(skills, tmp_path):
    twins = BankFolder.create(tmp_path / "bank", skills / "base", [skills / "drawer"])
    twins = twins.add(skills / "stove", ["open the top drawer of the cabinet"])
    twins = twins.add(skills / "soup", ["pick up the soup"])
    router = make_task_router("language", BankPolicy.load(twins), RouterSettings(margin=0.0))
    decision = router.route(observation(0, "open the top drawer of the cabinet"))
    assert decision.margin == 0 and decision.abstained
    assert not router.route(observation(0, "pick up the soup")).abstained


def test_language_needs_instructions(skills, tmp_path):
    save_tiny_expert(tmp_path / "mute", skills / "base", 5)
    folder = BankFolder.create(tmp_path / "bank", skills / "base", [tmp_path / "mute"])
    with pytest.raises(UserError, match="'mute' does not say which instructions"):
        make_task_router("language", BankPolicy.load(folder), SETTINGS)


def value_states(skills, name, seen):
    """What the last value projection reads in the expert's own policy, text left out, (T, n)."""
    alone, states = load_expert_policy(skills / "base", skills / name), []
    layer = alone.policy.model.decoder.backbone.layers[2].self_attn.v_proj
    layer.register_forward_pre_hook(lambda module, args: states.append(args[0][0]))
    alone.act(seen.images, seen.state, seen.instruction)
    return states[0][
        alone.preprocessor(alone.batch(seen.images, seen.state, seen.instruction))[
            "observation.language.tokens"
        ].shape[1] :
    ]


def test_value_subspace_by_hand(bank, skills):
    """Ours: the task vector's row space, last layer on last layer, relative to the state's size."""
    seen = observation(3)
    scores = make_task_router("value_subspace", bank, SETTINGS).scores(seen)
    for m, name in enumerate(NAMES):
        h = value_states(skills, name, seen).double()
        a = LoraExpert.load(skills / name).tensors[
            "model.decoder.backbone.layers.2.self_attn.v_proj.lora_A.weight"
        ]
        basis = torch.linalg.qr(a.double().T)[0]  # spans the rows of B A whatever B is
        expected = ((h @ basis).norm(dim=1) / h.norm(dim=1)).mean()
        assert float(scores[m]) == pytest.approx(float(expected), abs=1e-5)
    assert scores.min() > 0 and scores.max() < 1


def test_value_subspace_as_published(bank, skills):
    """The weight of the layer before the last, on states of the last, not relative to their size."""
    seen = observation(3)
    scores = make_task_router("value_subspace", bank, RouterSettings(parity=True)).scores(seen)
    for m, name in enumerate(NAMES):
        alone = load_expert_policy(skills / "base", skills / name)
        weight = alone.policy.model.decoder.backbone.layers[1].self_attn.v_proj.weight.detach().double()
        basis = torch.linalg.eigh(weight.T @ weight)[1][:, -8:]
        expected = (value_states(skills, name, seen).double() @ basis).norm(dim=1).mean()
        assert float(scores[m]) == pytest.approx(float(expected), rel=1e-4)


def test_value_subspace_of_a_cross_attention_decoder(tmp_path):
    """Its last block's two value projections, each on what it reads itself; the mean of both streams."""
    base = save_tiny_base(tmp_path / "base", action_decoder="cross_attention")
    folders = [save_tiny_expert(tmp_path / name, base, seed) for seed, name in enumerate(("a", "b"), 1)]
    bank = BankPolicy.load(BankFolder.create(tmp_path / "bank", base, folders))
    scores = make_task_router("value_subspace", bank, SETTINGS).scores(observation(3))
    block = "model.action_decoder.blocks.2"
    for m, folder in enumerate(folders):
        alone, ratios = load_expert_policy(base, folder), []
        given = observation(3)
        for name in (f"{block}.v_action", f"{block}.v_vision"):
            layer, states = alone.policy.get_submodule(name), []
            layer.register_forward_pre_hook(
                lambda module, args, states=states: states.append(args[0][0].double())
            )
            alone.act(given.images, given.state, given.instruction)
            change = layer.weight.detach().double() - bank.policy.get_submodule(name).weight.detach().double()
            basis = torch.linalg.eigh(change.T @ change)[1][:, -8:]
            ratios.append(((states[0] @ basis).norm(dim=1) / states[0].norm(dim=1)).mean())
        assert float(scores[m]) == pytest.approx(float(sum(ratios) / 2), rel=1e-4)


def test_value_subspace_asks_the_network_once(bank, monkeypatch):
    calls = Counter()
    predict = bank.policy.predict_action_chunk

    def counting(batch):
        calls["rows"] += len(batch["observation.state"])
        calls["calls"] += 1
        return predict(batch)

    router = make_task_router("value_subspace", bank, SETTINGS)
    monkeypatch.setattr(bank.policy, "predict_action_chunk", counting)
    router.route(observation(1))
    assert calls == {"calls": 1, "rows": 3}
    assert not any(module._forward_pre_hooks for module in bank.policy.modules())


def test_value_subspace_needs_value_projections(skills, tmp_path):
    save_tiny_expert(tmp_path / "elsewhere", skills / "base", 4, full=("model.decoder.backbone.layers.2",))
    folder = tmp_path / "elsewhere/adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    kept = {
        name: value for name, value in load_file(folder).items() if "layers.2.self_attn.v_proj" not in name
    }
    save_file(kept, folder)
    bank = BankFolder.create(tmp_path / "bank", skills / "base", [skills / "soup", tmp_path / "elsewhere"])
    with pytest.raises(UserError, match=r"'elsewhere' has no .*layers\.2\.self_attn\.v_proj"):
        make_task_router("value_subspace", BankPolicy.load(bank), SETTINGS)


def clusters(seed=0, count=40, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[3.0, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 3.0, 1.0]])
    return {
        name: centre + spread * torch.randn(count, 4, generator=generator)
        for name, centre in zip(NAMES, centres, strict=True)
    }


def test_the_probe_learns_and_is_deterministic():
    probe = fit_probe(clusters(), "base")
    assert probe.accuracy == 1.0 and probe.experts == NAMES
    fresh = clusters(seed=9)
    for m, name in enumerate(NAMES):
        assert (probe.probabilities(fresh[name]).argmax(-1) == m).all()
    torch.testing.assert_close(probe.probabilities(torch.zeros(2, 4)).sum(-1), torch.ones(2))
    assert torch.equal(probe.weight, fit_probe(clusters(), "base").weight)


def test_the_probe_is_calibrated():
    """Two overlapping clusters whose posterior is known: sigmoid(2 x) for unit Gaussians at -1 and 1."""
    generator = torch.Generator().manual_seed(0)
    x = {name: shift + torch.randn(1500, 1, generator=generator) for name, shift in (("a", -1.0), ("b", 1.0))}
    probe = fit_probe(x, "base")
    points = torch.linspace(-2, 2, 9)[:, None]
    torch.testing.assert_close(
        probe.probabilities(points)[:, 1], (2 * points[:, 0]).sigmoid(), atol=0.06, rtol=0
    )
    assert probe.calibration_error < 0.06 and 0.78 < probe.accuracy < 0.9


def test_the_probe_router(bank, skills, tmp_path):
    """Frames whose brightness tells the skill; cached, fitted, saved, loaded and asked."""

    def frame(m, seed):
        seen = observation(seed)
        for image in seen.images.values():
            image[:] = image // 4 + 60 * m
        return seen

    for m, name in enumerate(NAMES):
        features = torch.stack([bank.base_features(frame(m, seed)) for seed in range(12)])
        save_features(tmp_path, name, features, bank.base_hash)
    fit_probe(load_features(tmp_path, NAMES, bank.base_hash), bank.base_hash).save(tmp_path)
    settings = RouterSettings(folder=tmp_path)
    router = make_task_router("probe", bank, settings)
    for m in range(3):
        decision = router.route(frame(m, 100))
        assert decision.expert == m and sum(decision.scores) == pytest.approx(1.0, abs=1e-5)
    assert (
        make_task_router("probe", bank, RouterSettings(1.1, folder=tmp_path)).route(frame(0, 100)).abstained
    )
    other = BankFolder.create(tmp_path / "bank", skills / "base", [skills / name for name in NAMES[:2]])
    with pytest.raises(UserError, match="fitted for other experts"):
        make_task_router("probe", BankPolicy.load(other), settings)
    with pytest.raises(UserError, match="has no probe; `vla bank fit-probe`"):
        make_task_router("probe", bank, RouterSettings(folder=skills))
    with pytest.raises(UserError, match="No frames of the expert 'kettle'"):
        load_features(tmp_path, ["kettle"], bank.base_hash)
    with pytest.raises(UserError, match="'soup' has 3 frames"):
        fit_probe({"soup": torch.zeros(3, 2), "stove": torch.ones(20, 2)}, "base")


def test_a_probe_reordered(bank, tmp_path):
    """The bank's order counts, not the one in which the probe saw the experts."""
    size = len(bank.base_features(observation()))
    features = {
        name: torch.randn(12, size, generator=torch.Generator().manual_seed(i))
        for i, name in enumerate("abc")
    }
    forward = dict(zip(NAMES, features.values(), strict=True))
    fitted = fit_probe(dict(reversed(forward.items())), bank.base_hash)
    fitted.save(tmp_path)
    assert Probe.load(tmp_path).experts == NAMES[::-1]
    router = make_task_router("probe", bank, RouterSettings(folder=tmp_path))
    expected = fitted.probabilities(bank.base_features(observation(2))).flip(0)
    torch.testing.assert_close(router.scores(observation(2)), expected)


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=5), st.floats(0, 2, width=32))
def test_a_decision_is_the_best_or_an_abstention(scores, margin):
    class Router(TASK_ROUTERS["language"]):
        def __init__(self):
            self.margin = margin

    decision = Router().decide(torch.tensor(scores))
    best = max(scores)
    assert decision.expert == scores.index(best)
    others = [score for i, score in enumerate(scores) if i != decision.expert]
    if not others:
        assert decision.margin is None and not decision.abstained
    else:
        lead = best - max(others)
        assert decision.margin == pytest.approx(lead, abs=1e-5)
        assert decision.abstained == (decision.margin < margin or decision.margin == 0)


def test_wrong_names_and_options(bank):
    with pytest.raises(UserError, match=r"no task router 'langage'\. Did you mean 'language'"):
        make_task_router("langage", bank, SETTINGS)
    with pytest.raises(UserError, match="'language' has no published form"):
        make_task_router("language", bank, RouterSettings(parity=True))
    with pytest.raises(UserError, match=r"margin is -1\.0"):
        make_task_router("oracle", bank, RouterSettings(margin=-1.0))


def test_confusion_by_hand():
    verdicts = [
        Verdict("a", "a", 0.5, False),
        Verdict("a", "b", 0.1, True),
        Verdict("b", "b", 0.3, False),
        Verdict("b", "a", 0.2, False),
        Verdict("b", "b", 0.0, True),
    ]
    confusion = Confusion.of(("a", "b"), verdicts)
    assert confusion.matrix == [[1, 1], [1, 2]]
    assert confusion.accuracy == pytest.approx(3 / 5) and confusion.abstained == pytest.approx(2 / 5)
    assert confusion.accuracy_when_sure == pytest.approx(2 / 3)
    margins = confusion.as_dict()["margin"]
    assert margins["right"] == pytest.approx(0.8 / 3) and margins["wrong"] == pytest.approx(0.15)
    assert Confusion.of(("a",), []).accuracy is None

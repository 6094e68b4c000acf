"""`vla serve` with several experts: every client gets the one that its instruction asks for."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_serve_command import start

from vla.errors import UserError
from vla.experts.bank_folder import BankFolder
from vla.experts.expert_policy import load_expert_policy
from vla.experts.merge import merge
from vla.experts.recipe import load_recipe
from vla.policy.checkpoint import load_checkpoint
from vla.serving.client import RemotePolicy, ServerRefused
from vla.serving.experts import ExpertChoice
from vla.serving.serve import ServeConfig, serve_experts, serve_source
from vla.serving.session import Session

sys.path.append(str(Path(__file__).parents[1] / "experts"))

from tiny_skills import FULL, SIZE, save_tiny_base, save_tiny_expert

TAUGHT = {"soup": ("pick up the alphabet soup",), "stove": ("turn on the stove",)}
KEYS = "observation.images.image", "observation.images.image2"


@pytest.fixture(scope="module")
def skills(tmp_path_factory) -> Path:
    """A base, two experts, a bank and a masked merge of them."""
    folder = tmp_path_factory.mktemp("skills")
    base = save_tiny_base(folder / "base")
    experts = [
        save_tiny_expert(folder / name, base, seed, taught)
        for seed, (name, taught) in enumerate(TAUGHT.items(), 1)
    ]
    BankFolder.create(folder / "bank", base, experts)
    recipe = {"version": 1, "base": str(base), "experts": list(map(str, experts)), "lambda": 0.5}
    recipe |= {"method": "task_arithmetic", "private": [f"{part}.*" for part in FULL]}
    (folder / "merge.yaml").write_text(yaml.safe_dump(recipe))
    merge(load_recipe(folder / "merge.yaml"), folder / "merge")
    return folder


def seen(seed: int = 0) -> tuple[dict, np.ndarray]:
    generator = np.random.default_rng(seed)
    images = {key: generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for key in KEYS}
    return images, generator.normal(size=8).astype(np.float32)


def ask(session: Session, task: str, seed: int = 0) -> np.ndarray:
    images, state = seen(seed)
    return session.answer({**images, "observation.state": state, "prompt": task})["actions"]


def sessions(folder: Path, count: int, engine: str | None = None, **choice) -> list[Session]:
    config, chosen = ServeConfig(checkpoint=folder, device="cpu", engine=engine), ExpertChoice(**choice)
    source = chosen.source(folder)
    served = serve_experts(config, chosen) if source is None else serve_source(source, config)
    return [Session(served.make_policy(), served.contract) for _ in range(count)]


@pytest.mark.parametrize("kind", ["bank", "merge"])
def test_clients_of_one_server_get_the_expert_that_each_asks_for(skills, kind):
    first, second = sessions(skills / kind, 2)
    named = {name: sessions(skills / kind, 1, expert=name)[0] for name in TAUGHT}
    chunks = {}
    for seed, (client, name) in enumerate([(first, "soup"), (second, "stove"), (first, "stove")]):
        (task,) = TAUGHT[name]
        got = ask(client, task, seed)
        if kind == "bank":
            alone = load_expert_policy(skills / "base", skills / name).act(*seen(seed), task)
            np.testing.assert_array_equal(ask(named[name], task, seed), alone)
            np.testing.assert_allclose(got, alone, atol=2e-4)
        else:
            np.testing.assert_array_equal(got, ask(named[name], task, seed))
        chunks[name] = ask(named[name], "one and the same")
    assert np.abs(chunks["soup"] - chunks["stove"]).max() > 0.01


@pytest.mark.parametrize("kind", ["bank", "merge"])
def test_a_named_expert_runs_in_the_engine(skills, kind):
    (plain,), (fast,) = (sessions(skills / kind, 1, engine, expert="stove") for engine in (None, "fp32"))
    for seed in (0, 1):
        np.testing.assert_allclose(ask(fast, "open it", seed), ask(plain, "open it", seed), atol=2e-4)


def test_a_router_that_looks_looks_again_after_a_reset(skills, monkeypatch):
    from vla.experts.task_routers.value_subspace import ValueSubspaceRouter

    looks = []
    route = ValueSubspaceRouter.route
    monkeypatch.setattr(ValueSubspaceRouter, "route", lambda self, o: looks.append(o) or route(self, o))
    (client,) = sessions(skills / "bank", 1, router="value_subspace", margin=0.0)
    for _ in range(2):
        ask(client, "open it", 0)
        ask(client, "open it", 1)
        client.answer({"reset": 3})
    assert len(looks) == 2


def test_over_the_wire_and_who_cannot_be_told_is_a_sentence(skills):
    process, port = start("--checkpoint", skills / "bank", "--device", "cpu", "--task-router-margin", "0.2")
    try:
        with RemotePolicy(f"127.0.0.1:{port}", reply_timeout=30) as policy:
            assert policy.metadata["experts"] == ["soup", "stove"]
            assert policy.metadata["task_router"] == "language"
            images, state = seen()
            alone = load_expert_policy(skills / "base", skills / "stove")
            want = alone.act(images, state, "turn on the stove")
            np.testing.assert_allclose(policy.act(images, state, "turn on the stove"), want, atol=2e-4)
            with pytest.raises(ServerRefused, match=r"cannot tell whether '(soup|stove)'.*--expert"):
                policy.act(images, state, "the")
            np.testing.assert_allclose(policy.act(images, state, "turn on the stove"), want, atol=2e-4)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_merge_can_be_served_as_it_is(skills):
    process, port = start("--checkpoint", skills / "merge", "--device", "cpu", "--task-router", "none")
    try:
        with RemotePolicy(f"127.0.0.1:{port}", reply_timeout=30) as policy:
            assert "experts" not in policy.metadata
            want = load_checkpoint(skills / "merge").act(*seen(), "turn on the stove")
            np.testing.assert_allclose(policy.act(*seen(), "turn on the stove"), want, atol=1e-5)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("folder", "choice", "options", "words"),
    [
        ("bank", {"expert": "stve"}, {}, "no expert 'stve'. Did you mean 'stove'"),
        ("bank", {"router": "langage"}, {}, "Did you mean 'language'"),
        ("merge", {"expert": "soop"}, {}, "no expert 'soop'. Did you mean 'soup'"),
        ("bank", {}, {"engine": "auto"}, "name the expert that acts with --expert"),
        ("base", {"expert": "soup"}, {}, "neither a bank nor a merge: leave out --expert"),
    ],
)
def test_what_cannot_be_served_is_a_sentence(skills, folder, choice, options, words):
    with pytest.raises(UserError, match=words):
        sessions(skills / folder, 1, **options, **choice)

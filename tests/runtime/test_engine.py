"""The inference engine against the policy that it stands in for."""

import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_checkpoint import requests, shrunk, small_checkpoint

from vla.contract import ContractError
from vla.errors import UserError
from vla.policy.configuration_cogmerge import CogMergeConfig
from vla.runtime import probe
from vla.runtime.engine import PolicyEngine
from vla.runtime.policy_step import PolicyStep
from vla.runtime.program import MODES, modes_for
from vla.runtime.specialise import specialise, trace
from vla.runtime.split_text import SplitTextDecoder, can_split

READS_VALUES = {"item", "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2"}


@pytest.fixture(scope="module")
def loaded():
    return small_checkpoint()


@pytest.fixture(scope="module")
def engine(loaded):
    return PolicyEngine(loaded, "fp32")


def program(engine):
    return next(iter(engine._programs.values()))


def observe(loaded, images, state, text):
    """Tensors as `PolicyStep` reads them."""
    row = loaded.batch(images, state, text)
    keys = loaded.policy.config.camera_keys
    return torch.stack([row[key] for key in keys], dim=1), row["observation.state"]


def targets(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def relative(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def test_the_engine_answers_as_the_policy_does(loaded, engine):
    for request in requests(6):  # three instructions, of two lengths
        np.testing.assert_allclose(engine.act(*request), loaded.act(*request), atol=2e-5)
    assert len(engine._programs) == 2 and len(engine._instructions) == 3


def test_a_batch_of_mixed_instructions_gives_what_each_gives_alone(loaded, engine):
    asked = requests(3, seed=1)
    chunks = engine.act_many(asked)  # filled up to four
    assert chunks.shape == (3, 4, 7)
    np.testing.assert_allclose(chunks, np.stack([loaded.act(*request) for request in asked]), atol=2e-5)


def test_the_same_observation_gives_the_same_bits(engine):
    first, second = requests(2, seed=2)
    once = engine.act(*first)
    engine.act(*second)
    assert np.array_equal(engine.act(*first), once)


def test_what_the_instruction_decides_is_computed_when_it_is_first_heard(loaded):
    engine = PolicyEngine(loaded, "fp32")
    (images, state, text), (other_images, other_state, _) = requests(2, seed=3)
    engine.act(images, state, text)
    heard, early = [], program(engine)._early
    program(engine)._early = lambda *inputs: heard.append(1) or early(*inputs)
    engine.act(other_images, other_state, text)
    assert not heard
    engine.act(images, state, "close the drawer")
    assert len(heard) == 1


def test_with_every_observation_no_text_and_no_film_is_computed_again(loaded, engine):
    engine.act(*requests(1)[0])
    late, early = program(engine)._run, program(engine)._early
    model = loaded.policy.model
    films = [module.out for name, module in model.named_modules() if name.endswith("film")]
    assert len(films) == 2 + 2  # vision blocks and routers
    late_weights = {value.data_ptr() for value in vars(late).values() if isinstance(value, torch.Tensor)}
    late_weights |= {value.data_ptr() for _, value in late.named_buffers()}
    late_weights |= {value.data_ptr() for _, value in late.named_parameters()}
    assert not {film.weight.data_ptr() for film in films} & late_weights
    assert model.decoder.backbone.embed_tokens.weight.data_ptr() not in late_weights
    assert model.decoder.backbone.layers[0].mlp.gate_proj.weight.data_ptr() in late_weights
    assert "aten.embedding.default" in targets(early) and "aten.embedding.default" not in targets(late)
    # Observed rows alone go through the decoder: 8 vision tokens in the dense layer, state, 5 slots.
    rows = {
        node.meta["val"].shape[0]
        for node in late.graph.nodes
        if str(node.target) == "aten.mm.default" and node.meta["val"].shape[1] == 64
    }
    kept = loaded.policy.model.decoder.counts
    slots = len(model.slots)
    assert rows == {count + 1 + slots for count in kept}


def test_no_value_is_read_back_inside_the_step(engine):
    engine.act(*requests(1)[0])
    for graph in (program(engine)._early, program(engine)._run):
        assert not READS_VALUES & {name.split(".")[1] for name in targets(graph) if name.startswith("aten.")}

    def waits(x):
        return x * 2 if x.sum() > 0 else x

    with pytest.raises(RuntimeError, match="data-dependent"):
        trace(waits, (torch.ones(3),))


@pytest.mark.slow  # dynamo walks every line of the policy and of the processors
def test_the_step_compiles_without_a_graph_break(loaded):
    step = PolicyStep(loaded)
    images, state, text = requests(1)[0]
    inputs = (*step.tokens([text]), *observe(loaded, images, state, text))
    with torch.no_grad():
        expected = step(*inputs)
        compiled = torch.compile(step.policy.model, fullgraph=True, backend="eager")
        step.policy.model = compiled
        torch.testing.assert_close(step(*inputs), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_mask": "causal"},
        {"attention_mask": "no_vision_to_vision"},
        {"attention_mask": "full"},
        {"attention_mask": "modality_mutual"},
        {"attention": "coupled_two_call"},
        {"token_pruner": "none"},
        {"token_pruner": "pyramid_drop"},
        {"token_pruner": "feather"},
        {"token_pruner": "random"},
        {"action_decoder": "cross_attention"},
        {"decoder": "qwen3", "decoder_kv_heads": 1},
        {"vision_reducer": "average_pool"},
        {"vision_reducer": "farthest_point"},
        {"stem_strides": [8, 16], "keyframe": False},
        {"router_gate": "block"},
        {"router_gate": "mlp"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_routing_gives_the_same_as_a_step_of_two_streams(changes):
    checkpoint = small_checkpoint(**changes)
    text_alone = checkpoint.policy.config.attention_mask not in ("full", "modality_mutual")
    pruned = checkpoint.policy.config.token_pruner in ("lfp", "none")
    assert can_split(checkpoint.policy.model.decoder) == (text_alone and pruned)
    images, state, text = requests(2, seed=4)[1]
    step = PolicyStep(checkpoint)
    with torch.no_grad():
        got = step(*step.tokens([text]), *observe(checkpoint, images, state, text))[0]
    np.testing.assert_allclose(got, checkpoint.act(images, state, text), atol=2e-5)


@pytest.mark.parametrize(
    ("preset", "changes", "splits"),
    [
        ("mergevla-0.5b", {}, True),
        ("cogvla-7b", {}, True),
        ("cogvla-7b", {"parity": True, "action_decoder": "coordinate_l1"}, False),
    ],
)
def test_presets_of_pretrained_size_go_through_the_step(preset, changes, splits):
    checkpoint = small_checkpoint(**shrunk(preset) | changes)
    assert can_split(checkpoint.policy.model.decoder) == splits
    images, state, text = requests(2, seed=8)[1]
    step = PolicyStep(checkpoint)
    with torch.no_grad():
        got = step(*step.tokens([text]), *observe(checkpoint, images, state, text))[0]
    np.testing.assert_allclose(got, checkpoint.act(images, state, text), atol=2e-5)


def test_two_pretrained_encoders_are_traced_without_their_films():
    checkpoint = small_checkpoint(**shrunk("mergevla-0.5b"))
    request = requests(2, seed=8)[1]
    engine = PolicyEngine(checkpoint, "fp32")
    np.testing.assert_allclose(engine.act(*request), checkpoint.act(*request), atol=2e-5)
    late = program(engine)._run
    weights = {value.data_ptr() for value in (*late.buffers(), *late.parameters())}
    modules = checkpoint.policy.model.named_modules()
    films = [module for name, module in modules if name.endswith(("film.out", "gate.net.0"))]
    assert len(films) > 4 and not {film.weight.data_ptr() for film in films} & weights


@pytest.mark.parametrize(
    "changes", [{"attention_mask": "full"}, {"vision_reducer": "farthest_point", "token_pruner": "feather"}]
)
def test_what_cannot_be_split_is_traced_as_it_is(changes):
    checkpoint = small_checkpoint(**changes)
    request = requests(2, seed=4)[1]
    got = PolicyEngine(checkpoint, "fp32").act(*request)
    np.testing.assert_allclose(got, checkpoint.act(*request), atol=2e-5)


@pytest.fixture(scope="module")
def reduced(loaded):
    """Engines in reduced precision that have answered once."""
    engines = {mode: PolicyEngine(loaded, mode) for mode in ("bf16", "int8")}
    for engine in engines.values():
        engine.act(*requests(1)[0])
    return engines


@pytest.mark.parametrize(("mode", "limit"), [("bf16", 0.05), ("int8", 0.15)])
def test_reduced_precision_changes_actions_a_little(loaded, reduced, mode, limit):
    engine = reduced[mode]
    heard = requests(1)[0][2]
    asked = [(images, state, heard) for images, state, _ in requests(4, seed=5)]
    got = np.stack([engine.act(*request) for request in asked])
    expected = np.stack([loaded.act(*request) for request in asked])
    assert 1e-5 < relative(got, expected) < limit
    if mode == "int8":
        assert targets(program(engine)._run).count("quantized.linear_dynamic.default") > 20


def test_the_policy_itself_is_left_as_it_was(loaded, reduced):
    untouched = small_checkpoint()
    asked = requests(1, seed=6)[0]
    for engine in reduced.values():
        engine.act(*asked)
    assert np.array_equal(loaded.act(*asked), untouched.act(*asked))
    before = untouched.policy.state_dict()
    assert not isinstance(loaded.policy.model.decoder, SplitTextDecoder)
    assert all(torch.equal(value, before[name]) for name, value in loaded.policy.state_dict().items())
    step = PolicyStep(loaded)
    shared = {value.data_ptr() for value in loaded.policy.parameters()}
    assert {value.data_ptr() for value in step.policy.parameters()} == shared


def test_bad_input_is_refused_as_the_policy_refuses_it(loaded, engine):
    images, state, text = requests(1)[0]
    with pytest.raises(ContractError, match="lacks camera"):
        engine.act({"image": images["image"]}, state, text)
    with pytest.raises(UserError, match=r"no mode 'int4' on cpu\. Did you mean 'int8'"):
        PolicyEngine(loaded, "int4")
    foreign = copy.copy(loaded)
    foreign.postprocessor = copy.copy(loaded.postprocessor)
    foreign.postprocessor.steps = [*loaded.postprocessor.steps, loaded.postprocessor.steps[0]]
    with pytest.raises(UserError, match="2 UnnormalizerProcessorStep steps"):
        PolicyEngine(foreign, "fp32")


def test_specialise_cuts_by_what_depends_on_what():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    def run(early, late):
        table = (weight * 2).cos()  # constant
        scale = (early @ table).exp()  # early
        return late * scale + table.sum()

    early, late = torch.tensor([0.1, -0.2]), torch.tensor([5.0, 6.0])
    parts = specialise(trace(run, (early, late)), 1)
    handed = parts.early(early)
    torch.testing.assert_close(parts.late(late, *handed), run(early, late))
    assert targets(parts.late) == ["aten.mul.Tensor", "aten.add.Tensor"]
    assert "aten.exp.default" in targets(parts.early) and len(handed) == 1
    other = torch.tensor([1.0, 1.0])
    torch.testing.assert_close(parts.late(late, *parts.early(other)), run(other, late))


def test_an_input_that_crosses_unchanged_and_an_unused_one_are_no_trouble():
    inputs = [torch.ones(2) for _ in range(3)]
    parts = specialise(trace(lambda early, unused, late: early + late, inputs), 2)
    (handed,) = parts.early(torch.full((2,), 3.0), torch.ones(2))
    assert parts.late(torch.ones(2), handed).tolist() == [4, 4]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "cogmerge" / "runtime"


def test_auto_takes_the_fastest_mode_that_is_exact_enough_and_measures_once(
    loaded, reduced, cache, monkeypatch
):
    monkeypatch.setattr(probe, "modes_for", lambda device: ("fp32", "bf16", "int8"))
    measured = []

    def measure(engines, request):
        measured.append(sorted(engines))
        return {"fp32": 3.0, "bf16": 2.0, "int8": 1.0}

    monkeypatch.setattr(probe, "measure", measure)
    # Programs are those of `reduced`: what is tested is the choice, not their building again.
    build = PolicyEngine.__init__

    def with_programs(self, loaded, mode="auto", tolerance=0.01):
        build(self, loaded, mode, tolerance)
        if mode in reduced:
            self._programs, self._instructions = reduced[mode]._programs, reduced[mode]._instructions

    monkeypatch.setattr(PolicyEngine, "__init__", with_programs)
    error = {mode: probe.relative_error(engine, loaded) for mode, engine in reduced.items()}
    assert 0 < error["bf16"] < error["int8"]
    between = (error["bf16"] + error["int8"]) / 2
    assert PolicyEngine(loaded, "auto", tolerance=2 * error["int8"]).mode == "int8"
    assert PolicyEngine(loaded, "auto", tolerance=between).mode == "bf16"
    assert PolicyEngine(loaded, "auto", tolerance=0).mode == "fp32"
    assert measured == [["bf16", "fp32", "int8"]]
    (file,) = cache.iterdir()
    file.write_text("{")
    assert probe.mode_speeds(loaded)["int8"] == 1.0 and len(measured) == 2


def test_speeds_are_kept_by_architecture_and_not_by_training(loaded):
    def facts(**changes):
        changed = copy.copy(loaded)
        changed.policy = copy.copy(loaded.policy)
        changed.policy.config = copy.copy(loaded.policy.config)
        for name, value in changes.items():
            setattr(changed.policy.config, name, value)
        return probe.deciding_facts(changed)

    assert facts(optimizer_lr=1.0, pretrained_path="elsewhere") == facts()
    assert facts(token_pruner="none") != facts()
    assert "optimizer_lr" in CogMergeConfig.__dataclass_fields__


def test_measuring_gives_the_median_call_of_every_engine_after_its_program_is_built(monkeypatch):
    now = 0.0

    class Engine:
        """Takes 100 s to build a program, then `seconds` a call, but thrice that every third time."""

        def __init__(self, seconds):
            self.seconds, self.calls = seconds, 0

        def act(self, *request):
            nonlocal now
            self.calls += 1
            now += 100.0 if self.calls == 1 else self.seconds * (3 if self.calls % 3 == 0 else 1)

    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: now))
    seconds = probe.measure({"slow": Engine(0.02), "fast": Engine(0.005)}, requests(1)[0])
    assert seconds == pytest.approx({"slow": 0.02, "fast": 0.005})


def test_random_requests_are_always_the_same_and_fit_the_contract(loaded):
    first, second = (probe.random_requests(loaded.contract, 2) for _ in range(2))
    for (images, state, _), (same_images, same_state, _) in zip(first, second, strict=True):
        assert all(np.array_equal(images[key], same_images[key]) for key in images)
        assert np.array_equal(state, same_state)
        loaded.batch(images, state, "open the drawer")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_a_captured_step_equals_the_same_kernels_launched_one_by_one_and_never_waits(mode):
    checkpoint = small_checkpoint()
    checkpoint.policy.to("cuda")
    for pipeline in (checkpoint.preprocessor, checkpoint.postprocessor):
        for step in pipeline.steps:
            if hasattr(step, "stats"):
                step.to(device="cuda")
    engine = PolicyEngine(checkpoint, mode)
    asked = requests(3, seed=7)
    engine.act(*asked[0])
    tokens, valid = (t.cuda() for t in engine._step.tokens([asked[0][2]]))
    observation = engine.observe(asked[:1])
    captured = program(engine)
    instruction = captured.instruction(tokens, valid)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = captured(observation, instruction)
        again = captured(observation, instruction)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = captured._run.run(*observation, *instruction)
    assert torch.equal(got, expected) and torch.equal(got, again)


def test_code_that_was_compiled_for_more_threads_is_not_run_by_one(tmp_path):
    """torch keeps compiled code on disk and does not ask for how many threads it was made."""
    program = """
import torch
from vla.runtime.program import compiler_options

for threads in (2, 1):
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    torch.compile(lambda x: (x * 2).sin(), options=compiler_options())(torch.randn(1 << 20))
"""
    unproved = {"TORCHINDUCTOR_VEC_ISA_OK": "1"}  # torch would start an interpreter per set of instructions
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} | unproved
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
    kernels = [path.read_text() for path in tmp_path.rglob("*.main.cpp")]
    assert len(kernels) == 2 and sum("num_threads(2)" in kernel for kernel in kernels) == 1


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert modes_for(torch.device("cpu")) == ("fp32", "bf16", "int8")
    monkeypatch.setenv("CXX", "true")
    assert modes_for(torch.device("cpu")) == tuple(MODES)
    assert modes_for(torch.device("cuda")) == ("fp32", "bf16")


def test_modes_name_what_they_do():
    assert {mode.precision for mode in MODES.values()} == {"fp32", "bf16", "int8"}
    assert [name for name, mode in MODES.items() if mode.compiled] == ["fp32_compiled", "bf16_compiled"]

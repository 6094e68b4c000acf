"""scripts/gpu_check where there is no GPU, the outcome of its tests, and the cases that it would time."""

import importlib.util
import os
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import torch

import vla.kernels
from vla.evaluation.policy_source import SHIPPED_CHECKPOINT
from vla.kernels import microbenchmark
from vla.policy.checkpoint import load_checkpoint

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check"
FRAME = {"__init__", "attend", "dispatch", "launch", "microbenchmark"}
OPS = {path.stem for path in Path(vla.kernels.__file__).parent.glob("*.py")} - FRAME


@pytest.fixture
def script(monkeypatch):
    """The script as a module; the variable keeps it from replacing this process by its own interpreter."""
    monkeypatch.setenv("COGMERGE_GPU_CHECK", "1")
    loader = SourceFileLoader("gpu_check", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_check", loader))
    loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so_in_one_sentence_and_exits_with_2(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONSAFEPATH"] = "1"  # as scripts/test sets it: the script must find its own modules
    command = [sys.executable, SCRIPT, "--out", tmp_path]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines() == [
        "No CUDA GPU found: nothing was run; try again on a machine with one."
    ]
    assert not list(tmp_path.iterdir())


def test_it_counts_every_outcome_of_the_gpu_tests(script, tmp_path):
    (tmp_path / "test_outcomes.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 0\n"
        "def test_skips(): pytest.skip('why')\n"
        "@pytest.fixture\ndef broken(): raise ValueError\n"
        "def test_errors(broken): pass\n"
    )
    (tmp_path / "test_unmarked.py").write_text("def test_fails(): assert 0\n")
    found = script.run_gpu_tests(str(tmp_path))
    assert (found["exit_code"], found["passed"]) == (1, 1)
    assert found["failed"] == ["test_outcomes::test_fails", "test_outcomes::test_errors"]
    assert found["skipped"] == ["test_outcomes::test_skips"]


def test_every_operation_is_timed_and_its_case_runs():
    cases = list(microbenchmark.cases("cpu", torch.float32, shrink=64))
    assert {case.name.split()[0].rstrip("_") for case in cases} == OPS
    for case in cases:
        results = case.run("torch")
        assert results and all(x.isfinite().all() and x.numel() > 1 for x in results), case.name


@pytest.fixture
def policy_kernels(monkeypatch):
    """The benchmark of whole steps, which lies beside the script."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("benchmarks.policy_kernels")


def test_a_switch_stays_on_if_the_whole_step_gets_faster_among_those_that_stayed(policy_kernels):
    """Milliseconds of a made-up GPU: K1 gains, K6 loses, scatter gains less than counts."""
    saves = {"add_film_norm": 1.0, "coupled_attention": -0.5, "scatter_residual": 0.01, "gated_product": 2.0}
    built = []

    def build(ops):
        built.append(tuple(ops))
        return 10.0 - sum(saves.get(op, 0.0) for op in ops)

    def turn_on(build, seconds):
        every = {op for switch in policy_kernels.SWITCHES for op in switch}
        called = every - {"product_residual", "select_gather_norm", "action_expert_block"}
        return policy_kernels.try_switches(build, lambda a, b: (a, b), time.monotonic() + seconds, called)

    found = turn_on(build, 60)
    assert found["kept"] == ["add_film_norm", "gated_product"] and not found["left_out"]
    assert found["not_called"] == ["product_residual", "action_expert_block"]
    assert built == [
        (),
        ("coupled_attention",),
        ("add_film_norm",),
        ("add_film_norm", "film_route_select", "select_gather_norm"),
        ("add_film_norm", "scatter_residual"),
        ("add_film_norm", "gated_product"),
        ("add_film_norm", "gated_product", "qkv_rope"),
    ]
    rows = {row["switch"]: row for row in found["rows"]}
    assert rows["gated_product"]["without_ms"] == 9.0 and rows["gated_product"]["with_ms"] == 7.0

    def refuse(ops):
        if ops and ops[-1] == "scatter_residual":
            raise RuntimeError("shared\nmemory")
        return build(ops)

    stopped = turn_on(refuse, 60)
    assert stopped["kept"] == found["kept"] and stopped["failed"] == {"scatter_residual": "shared memory"}
    late = turn_on(build, -1)
    assert late["kept"] == []
    assert len(late["left_out"]) + len(late["not_called"]) == len(policy_kernels.SWITCHES)


def test_what_a_policy_does_not_call_is_not_timed(policy_kernels):
    def run(ops):
        if "qkv_rope" in ops:
            raise RuntimeError("out of shared memory")
        x = torch.ones(1, 2, 4)
        if "gated_product" in ops:
            x = torch.ops.cogmerge.gated_product(x, torch.ones(4, 4), torch.ones(4, 4))
        if "add_film_norm" not in ops:  # what is not on alone does not count
            torch.ops.cogmerge.product_residual(x, x, torch.ones(4, 4))
        return x

    want = {"gated_product", "product_residual", "qkv_rope"}
    assert policy_kernels.called_operations(run) == want


def test_on_a_cpu_a_policy_calls_no_kernel(policy_kernels):
    loaded = load_checkpoint(SHIPPED_CHECKPOINT)
    assert policy_kernels.called_operations(lambda ops: policy_kernels.eager_step(loaded, ops)) == set()


def test_a_kernel_qualifies_where_it_helps_one_policy_and_harms_none(policy_kernels):
    def row(switch, ratio):
        return {"switch": switch, "ratio": ratio}

    pair = "film_route_select + select_gather_norm"
    first = {
        "kept": ["a", "film_route_select", "select_gather_norm"],
        "rows": [row("a", 0.9), row(pair, 0.9)],
    }
    second = {"kept": [], "rows": [row("a", 1.005), row(pair, 1.05)]}
    assert policy_kernels.to_qualify([first, second]) == ["a"]
    assert policy_kernels.to_qualify([first]) == ["a", "film_route_select", "select_gather_norm"]


def test_every_switch_is_an_operation_and_off_it_changes_nothing(policy_kernels, monkeypatch):
    from vla.kernels import dispatch

    monkeypatch.setattr(dispatch, "FORCED", None)
    names = [op for switch in policy_kernels.SWITCHES for op in switch]
    assert len(set(names)) == len(names) and set(names) <= OPS
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with dispatch.qualified(names[:1]):
        assert dispatch.choose(names[0], None).path == "triton"
        assert dispatch.choose(names[1], None).path == "torch"
    assert dispatch.choose(names[0], None).path == "torch"


@pytest.mark.gpu
def test_whole_steps_with_all_kernels_and_with_none_agree(policy_kernels):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    loaded = policy_kernels.load_preset("nano", torch.device("cuda"))
    assert policy_kernels.fp32_difference(loaded) < 1e-4
    exact = policy_kernels.captured_step(loaded, (), "fp32")()
    none = policy_kernels.captured_step(loaded, ())
    every = policy_kernels.captured_step(loaded, [op for switch in policy_kernels.SWITCHES for op in switch])
    # In bf16 a token at the edge of being kept may change sides, so each is set against fp32.
    errors = [((step() - exact).norm() / exact.norm()).item() for step in (none, every)]
    assert errors[1] <= 1.5 * errors[0] + 1e-2
    assert min(policy_kernels.in_turns(none, every)) > 0


def test_what_no_time_is_left_for_is_named():
    cases = list(microbenchmark.cases("cpu", torch.float32, shrink=64))
    rows, left_out = microbenchmark.measure_all(cases, time.monotonic() - 1)
    assert rows == [] and left_out == [case.name for case in cases]


def test_every_case_is_one_graph_for_the_compiler():
    """What `measure` compiles on a GPU, captured without one."""
    for case in microbenchmark.cases("cpu", torch.float32, shrink=64):
        with torch.no_grad():
            call = microbenchmark.compiled(case, backend="eager")
            for got, want in zip(call(), case.run("torch"), strict=True):
                torch.testing.assert_close(got, want)


def test_a_case_that_a_gpu_refuses_leaves_the_others_their_turn(monkeypatch):
    cases = list(microbenchmark.cases("cpu", torch.float32, shrink=64))[:2]

    def measure(case):
        if case is cases[0]:
            raise RuntimeError("out of resources:\n shared memory")
        return {"name": case.name}

    monkeypatch.setattr(microbenchmark, "measure", measure)
    rows, left_out = microbenchmark.measure_all(cases, time.monotonic() + 60)
    assert (
        rows
        == [
            {"name": cases[0].name, "error": "out of resources: shared memory"},
            {"name": cases[1].name},
        ]
        and not left_out
    )


@pytest.mark.gpu
def test_a_case_is_measured():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    row = microbenchmark.measure(next(microbenchmark.cases("cuda")))
    assert row["relative_difference"] < 1e-2
    assert min(row["torch_us"], row["compiled_us"], row["triton_us"]) > 0

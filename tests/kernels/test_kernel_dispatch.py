"""Which path a call takes, and that it says why."""

import subprocess
import sys

import pytest
import torch

from vla.errors import UserError
from vla.kernels import dispatch
from vla.kernels.dispatch import choose, triton_refusal


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.setattr(dispatch, "FORCED", None)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", True)


def test_a_cpu_tensor_takes_the_torch_path_and_hears_why():
    choice = choose("op", triton_refusal(torch.zeros(1)))
    assert choice.path == "torch" and "on cpu" in choice.reason


def test_a_machine_without_triton_hears_that(monkeypatch):
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    assert triton_refusal(torch.zeros(1)) == "Triton is not installed"


def test_the_interpreter_lifts_the_need_for_a_gpu_but_is_never_chosen(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    monkeypatch.setattr(dispatch, "QUALIFIED", frozenset({"op"}))
    assert triton_refusal(torch.zeros(1)) is None
    assert "float64" in triton_refusal(torch.zeros(1, dtype=torch.float64))
    assert choose("op", None).path == "torch"
    assert choose("op", None, "triton").path == "triton"


def test_a_kernel_is_off_until_an_end_to_end_gain_is_on_record(monkeypatch):
    assert choose("op", None).path == "torch"
    monkeypatch.setattr(dispatch, "QUALIFIED", frozenset({"op"}))
    assert choose("op", None).path == "triton"
    assert choose("other", None).path == "torch"


def test_the_caller_outranks_the_environment(monkeypatch):
    monkeypatch.setattr(dispatch, "FORCED", "triton")
    assert choose("op", None) == dispatch.Choice("triton", "forced by COGMERGE_KERNELS")
    assert choose("op", None, "torch") == dispatch.Choice("torch", "forced by the caller")


def test_a_forced_path_that_cannot_run_is_an_error_with_the_reason(monkeypatch):
    with pytest.raises(UserError, match="the caller forces the Triton path, but the tensors are on cpu"):
        choose("op", triton_refusal(torch.zeros(1)), "triton")
    monkeypatch.setattr(dispatch, "FORCED", "cuda")
    with pytest.raises(UserError, match=r"no path 'cuda'.*COGMERGE_KERNELS.*torch, triton"):
        choose("op", None)


def test_the_environment_variable_is_read_and_importing_imports_no_triton():
    program = (
        "import sys; from vla.kernels import add_film_norm as op; import torch;"
        "assert 'triton' not in sys.modules;"
        "print(op.dispatch(torch.zeros(1, 1, 1)).reason)"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={"COGMERGE_KERNELS": "torch", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "forced by COGMERGE_KERNELS"

"""The `vla` command from outside: help, refusals and exit codes."""

import errno
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vla import cli
from vla.errors import UserError

VLA = Path(sys.executable).with_name("vla")


def vla(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run([VLA, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options)


def test_help_lists_the_commands_and_loads_nothing_heavy():
    program = (
        "import sys; from vla import cli; assert cli.run(['--help']) == 0;"
        "print(sorted({'torch', 'lerobot', 'mujoco', 'libero', 'tyro'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    for name in cli.COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_listed_command_exists(name):
    command = cli.COMMANDS[name]
    module = importlib.import_module(command.module)
    assert callable(getattr(module, command.config)) and callable(getattr(module, command.run))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_describes_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run([*name.split(), "--help"])
    assert stop.value.code == 0
    assert f"usage: vla {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["colect"], "Did you mean 'collect'?"),
        (["inspect", "nanoo"], "Did you mean 'nano'?"),
        (["inspect", "/"], "is not a checkpoint"),
        (["collect", "--suite", "libero_objects", "--out", "x"], "Did you mean 'libero_object'?"),
        (["collect", "--suite", "libero_object", "--tasks", "11", "--out", "x"], "there are 0 to 9"),
        (["train", "--out", "x"], "--dataset"),
        (["train", "--out", "x", "--dataset", "nowhere"], "nowhere"),
        (["eval", "--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said and "\n" not in said
    assert not any(tmp_path.iterdir())


def test_existing_output_is_refused_by_the_process(tmp_path):
    (tmp_path / "precious").touch()
    done = vla("collect", "--suite", "libero_object", "--out", tmp_path)
    assert done.returncode == 2 and "exists already" in done.stderr and "Traceback" not in done.stderr


def test_malformed_option_is_code_2():
    done = vla("collect", "--suite", "libero_object", "--out", "x", "--workers", "many")
    assert done.returncode == 2


@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM])
def test_interruption_is_code_130(interrupt, tmp_path):
    arguments = ["--suite", "libero_object", "--tasks", "0", "--episodes-per-task", "1"]
    run = subprocess.Popen(
        [VLA, "collect", *arguments, "--out", tmp_path / "demo"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "demo.partial" / "plan.json").exists():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.05)
    run.send_signal(interrupt)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130 and "--resume" in said and "Traceback" not in said
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UserError("The cat sat on the arm."), 2, "The cat sat on the arm."),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x"), 2, "The disk is full at /data/x"),
    ],
)
def test_errors_become_sentences(error, code, sentence, monkeypatch, capsys):
    def broken(config):
        raise error

    monkeypatch.setattr("vla.doctor.doctor", broken)
    assert cli.run(["doctor"]) == code
    assert sentence in capsys.readouterr().err


def test_other_errors_keep_their_traceback(monkeypatch):
    def broken(config):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr("vla.doctor.doctor", broken)
    with pytest.raises(OSError, match="broken disk"):
        cli.run(["doctor"])

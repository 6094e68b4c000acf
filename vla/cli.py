"""The `vla` command: a table of verbs, each a config dataclass and the function that runs it.

A verb's module is imported only when the verb is named, so that `vla --help` needs neither torch nor
a simulator. Exit codes: 0 done, 2 the user can put it right (one sentence on stderr), 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from vla import __version__
from vla.errors import UserError, nearest

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for Ctrl-C


@dataclass(frozen=True)
class Command:
    """One verb. `module` holds the dataclass `config` and the function `run`, which takes one."""

    summary: str
    module: str
    config: str
    run: str


COMMANDS: dict[str, Command] = {
    "collect": Command(
        "record scripted demonstrations as a LeRobotDataset", "vla.sim.collection", "CollectConfig", "collect"
    ),
    "train": Command("train a policy on a dataset", "vla.training.loop", "TrainConfig", "train"),
    "eval": Command("measure a checkpoint in LIBERO", "vla.evaluation.run", "EvalConfig", "evaluate"),
    "eval compare": Command(
        "compare two evaluations, paired episode by episode",
        "vla.evaluation.compare",
        "CompareConfig",
        "compare",
    ),
    "merge": Command(
        "merge LoRA experts into one checkpoint", "vla.experts.merge", "MergeConfig", "run_merge"
    ),
    "run": Command("let a policy drive an arm, safely", "vla.runtime.robot.run", "RunConfig", "run_robot"),
    "serve": Command(
        "answer observations with actions over a websocket",
        "vla.serving.serve",
        "ServeConfig",
        "serve_checkpoint",
    ),
    "bank create": Command(
        "put LoRA experts side by side on one base",
        "vla.experts.bank_folder",
        "BankCreateConfig",
        "bank_create",
    ),
    "bank add": Command("add an expert to a bank", "vla.experts.bank_folder", "BankAddConfig", "bank_add"),
    "bank fit-probe": Command(
        "fit the probe router of a bank or merge",
        "vla.evaluation.probe_fitting",
        "FitProbeConfig",
        "run_fit_probe",
    ),
    "bank remove": Command(
        "remove an expert from a bank", "vla.experts.bank_folder", "BankRemoveConfig", "bank_remove"
    ),
    "demonstrate": Command(
        "measure the scripted demonstrators, task by task",
        "vla.sim.demonstrators.table",
        "DemonstratorTableConfig",
        "demonstrator_table",
    ),
    "robot scan": Command(
        "list the servos that answer at the serial ports",
        "vla.robot_drivers.commands.scan",
        "ScanConfig",
        "scan",
    ),
    "robot calibrate": Command(
        "teach an arm its middle and ranges, or copy them from a file or its servos",
        "vla.robot_drivers.commands.calibrate",
        "CalibrateConfig",
        "calibrate",
    ),
    "robot check": Command(
        "examine an arm without moving it",
        "vla.robot_drivers.commands.check",
        "CheckConfig",
        "check",
    ),
    "robot rest": Command(
        "lay an arm down and release it", "vla.robot_drivers.commands.rest", "RestConfig", "rest"
    ),
    "robot replay": Command(
        "drive a recorded run again",
        "vla.robot_drivers.commands.replay",
        "ReplayConfig",
        "replay_record",
    ),
    "robot plot": Command(
        "draw a recorded run: asked, sent, measured, rates, faults",
        "vla.robot_drivers.commands.plot",
        "PlotConfig",
        "plot_record",
    ),
    "robot emulate": Command(
        "an SO101 without hardware, at a serial port",
        "vla.robot_drivers.commands.emulate",
        "EmulateConfig",
        "emulate",
    ),
    "convert": Command(
        "turn released OpenVLA, OpenVLA-OFT or CogVLA weights into a checkpoint",
        "vla.convert",
        "ConvertConfig",
        "run_convert",
    ),
    "inspect": Command(
        "show what a checkpoint or a preset is made of", "vla.inspection", "InspectConfig", "inspect"
    ),
    "doctor": Command(
        "check this machine and say how to put it right", "vla.doctor", "DoctorConfig", "doctor"
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process with its code."""
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    resumable = False
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_help())
            return 0
        if arguments[0] == "--version":
            print(f"vla {__version__}")
            return 0
        name, rest = _split(arguments)
        function, config = _parse(name, rest)
        resumable = hasattr(config, "resume")
        function(config)
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        _say("Interrupted." + (" Run the same command with --resume to go on." if resumable else ""))
        return EXIT_INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" at {error.filename}" if error.filename else ""
        again = " with --resume" if resumable else ""
        return _fail(f"The disk is full{where}: free some space and run the same command again{again}.")
    return 0


def _split(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Split a command line into the longest known verb and its own arguments."""
    for length in (2, 1):
        name = " ".join(arguments[:length])
        if name in COMMANDS:
            return name, arguments[length:]
    raise UserError(
        f"There is no command '{arguments[0]}'.{nearest(arguments[0], COMMANDS)} `vla --help` lists them all."
    )


def _parse(name: str, arguments: Sequence[str]) -> tuple[Any, Any]:
    """Import the verb and read its config; tyro itself exits with code 2 on a malformed option."""
    import tyro

    command = COMMANDS[name]
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        raise UserError(_missing(name, error)) from error
    config = tyro.cli(
        getattr(module, command.config),
        prog=f"vla {name}",
        args=list(arguments),
        description=_description(name, command),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return getattr(module, command.run), config


def _missing(name: str, error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0]
    if package in ("libero", "robosuite", "mujoco", "bddl", "scipy", "gymnasium"):
        return f"`vla {name}` needs the simulator: pip install 'lerobot_policy_cogmerge[sim]' ({error})."
    return f"`vla {name}` cannot be loaded: {error}; install the package again with its dependencies."


def _description(name: str, command: Command) -> str:
    nested = [other for other in COMMANDS if other.startswith(name + " ")]
    more = "".join(f" See also `vla {other} --help`: {COMMANDS[other].summary}." for other in nested)
    return f"{command.summary[0].upper()}{command.summary[1:]}.{more}"


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    footer = "`vla COMMAND --help` describes a command's options."
    return "\n".join(["usage: vla COMMAND [OPTIONS]", "", *lines, "", footer])


def _fail(sentence: str) -> int:
    _say(sentence)
    return EXIT_USER_ERROR


def _say(sentence: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(sentence, style="bold red", markup=False, highlight=False, soft_wrap=True)


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    """Make SIGTERM unwind like Ctrl-C, so that everything is left resumable."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()

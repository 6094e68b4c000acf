"""What every benchmark shares: its options, the printed table and the JSON file.

A benchmark is a module with a function ``run(...)`` whose keyword arguments are its options and which returns
rows: dictionaries of name, value, unit, baseline, baseline_value and ratio.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from vla.atomic import write_text

PACKAGES = ("lerobot_policy_cogmerge", "lerobot", "torch", "transformers", "mujoco", "robosuite", "numpy")


def run_benchmark(name: str, arguments: list[str]) -> list[dict[str, Any]]:
    """Run benchmark `name` with command-line `arguments`; ``--json FILE`` also writes the result."""
    rest, json_path = _split_json_option(arguments)
    run: Callable[..., list[dict[str, Any]]] = import_module(f"benchmarks.{name}").run
    rows = tyro.cli(run, args=rest, prog=f"scripts/bench {name}")
    Console().print(make_table(name, rows))
    if json_path is not None:
        write_json(json_path, {"benchmark": name, **describe_machine(), "rows": rows})
    return rows


def make_table(name: str, rows: list[dict[str, Any]]) -> Table:
    """One line per row, with the ratio to the baseline."""
    table = Table(title=f"scripts/bench {name}")
    for column in ("", "value", "unit", "baseline", "baseline value", "ratio"):
        table.add_column(column, justify="left" if column in ("", "unit", "baseline") else "right")
    for row in rows:
        numbers = [_number(row[key]) for key in ("value", "baseline_value", "ratio")]
        table.add_row(row["name"], numbers[0], row["unit"], row["baseline"] or "", numbers[1], numbers[2])
    return table


def describe_machine() -> dict[str, Any]:
    """Machine, package versions, commit and time: what a number is worth nothing without."""
    return {
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg(),
            "gpu": _gpu(),
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def _split_json_option(arguments: list[str]) -> tuple[list[str], Path | None]:
    for index, argument in enumerate(arguments):
        if argument.startswith("--json="):
            return arguments[:index] + arguments[index + 1 :], Path(argument.split("=", 1)[1])
        if argument == "--json":
            if index + 1 == len(arguments):
                raise SystemExit("--json needs a file name.")
            return arguments[:index] + arguments[index + 2 :], Path(arguments[index + 1])
    return arguments, None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an extra that this benchmark does not need
            continue
    return found


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"

"""Metrics as JSON lines in the run's folder, and the same rows to a tracker if one is wanted."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

from vla.atomic import write_text
from vla.errors import UserError

METRICS_FILE = "metrics.jsonl"
PROJECT = "cogmerge"

Row = dict[str, Any]


class MetricsLog:
    """Append rows ``{"kind", "step", ...}`` to ``metrics.jsonl``; kinds are train and held_out.

    Opening it at `step` drops the rows after that step: a killed run logged them, the resumed one will
    log them again. `tracker` is none, trackio or wandb; both speak ``init``, ``log`` and ``finish``.
    """

    def __init__(
        self,
        out: Path,
        step: int,
        *,
        tracker: str = "none",
        run_id: str = "",
        config: Row | None = None,
        enabled: bool = True,
    ):
        self.path = out / METRICS_FILE
        self._enabled, self._tracker = enabled, None
        if not enabled:  # a process other than the main one
            return
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._tracker = _open_tracker(tracker, out.resolve(), run_id, config or {})

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one row; it is on disk when this returns."""
        if not self._enabled:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._tracker is not None:
            self._tracker.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Finish the tracker."""
        if self._tracker is not None:
            self._tracker.finish()


class Window:
    """Means over the steps since the last row, and the time they took."""

    def __init__(self, samples_per_step: int):
        self._samples_per_step = samples_per_step
        self._sums: Row = {}
        self._steps = 0
        self._mark = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        return seconds

    def add(self, values: Row) -> None:
        """Add one step, its ``data_seconds`` and ``update_seconds`` among the values."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1

    def close(self) -> Row:
        """Return the means with ``samples_per_second``, and start anew."""
        seconds = self._sums["data_seconds"] + self._sums["update_seconds"]
        row = {name: total / self._steps for name, total in self._sums.items()}
        row["samples_per_second"] = self._steps * self._samples_per_step / seconds
        self._sums, self._steps = {}, 0
        return row


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of a metrics file; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _open_tracker(name: str, out: Path, run_id: str, config: Row) -> Any:
    if name == "none":
        return None
    try:
        tracker = importlib.import_module(name)
    except ModuleNotFoundError:
        raise UserError(f"--logger {name} needs the package {name}: pip install {name}.") from None
    if name == "wandb":
        identity = {"name": out.name, "id": run_id, "dir": out}
    else:  # knows runs by their name alone, and folders called "run" are many
        identity = {"name": f"{out.name}-{run_id[:8]}"}
    try:
        tracker.init(project=PROJECT, config=config, resume="allow", **identity)
    except getattr(tracker, "Error", ()) as error:  # wandb's, without a login for example
        raise UserError(
            f"--logger {name} cannot start ({' '.join(str(error).split())}); log in, or set"
            " WANDB_MODE=offline."
        ) from None
    return tracker

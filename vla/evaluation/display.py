"""What the terminal shows: a progress line while episodes run, and the table at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from vla.evaluation.records import ERROR, EpisodeRecord


class RunDisplay:
    """A progress bar with the running success; a context manager."""

    def __init__(self, total: int, done: Iterable[EpisodeRecord], title: str = "evaluating"):
        self._records = list(done)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[success]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=Console(stderr=True),
        )
        self._bar = self._progress.add_task(
            title, total=total, completed=len(self._records), success=self._running_success()
        )

    def advance(self, record: EpisodeRecord) -> None:
        """Count one more episode."""
        self._records.append(record)
        self._progress.update(self._bar, advance=1, success=self._running_success())
        if record.status == ERROR:
            self._progress.console.print(
                f"[red]error[/red] {record.suite} task {record.task}, initial state {record.init_state}:",
                record.errors[-1],
                highlight=False,
            )

    def _running_success(self) -> str:
        valid = [record for record in self._records if record.status != ERROR]
        if not valid:
            return ""
        successes = sum(bool(record.success) for record in valid)
        return f"{successes}/{len(valid)} solved ({100 * successes / len(valid):.0f} %)"

    def __enter__(self) -> RunDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def print_scores(summary: Mapping[str, Any], report: Path) -> None:
    """Print one row per task and the total, and where the report is."""
    table = Table(title=f"{summary['provenance']['checkpoint']}", title_justify="left")
    table.add_column("task", no_wrap=True)
    table.add_column("instruction")
    for heading in ("solved", "success", "95 % interval", "errors"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task in summary["tasks"]:
        table.add_row(f"{task['suite']} {task['task']}", task["language"], *_cells(task))
    table.add_section()
    if len(summary["suites"]) > 1:
        for name, score in summary["suites"].items():
            table.add_row(name, "", *_cells(score))
        table.add_section()
    table.add_row("total", "", *_cells(summary["total"]), style="bold")
    console = Console()
    console.print(table)
    console.print(f"Report: {report}", highlight=False, soft_wrap=True)


def percent(rate: float | None) -> str:
    """Format a rate, or a dash where there is none."""
    return "–" if rate is None else f"{100 * rate:.1f} %"


def _cells(score: Mapping[str, Any]) -> list[str]:
    low, high = score["interval"]
    return [
        f"{score['successes']}/{score['episodes']}",
        percent(score["rate"]),
        f"{100 * low:.1f} – {100 * high:.1f}",
        str(score["errors"] or ""),
    ]

"""``vla eval compare``: two evaluations of the same plan, paired episode by episode."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from vla.atomic import write_text
from vla.errors import UserError
from vla.evaluation.plan import Plan
from vla.evaluation.records import ERROR, EpisodeRecord, read_records
from vla.evaluation.statistics import exact_paired_p, paired_difference_interval
from vla.sim.episode import Episode


@dataclass(frozen=True)
class CompareConfig:
    """Compare two evaluations of the same plan."""

    first: Annotated[Path, tyro.conf.Positional]
    """Folder of the first evaluation, the baseline."""
    second: Annotated[Path, tyro.conf.Positional]
    """Folder of the second evaluation."""
    json: Path | None = None
    """Also write the comparison to this file."""


@dataclass(frozen=True)
class Comparison:
    """The paired table of one task, or of all, and what follows from it.

    `difference` is the success rate of the second minus that of the first. `dropped` pairs had an
    error on either side and are in no other count.
    """

    name: str
    both: int
    only_first: int
    only_second: int
    neither: int
    dropped: int

    @property
    def pairs(self) -> int:
        """Episodes with a result on both sides."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float | None:
        """Rate of the second minus rate of the first."""
        return (self.only_second - self.only_first) / self.pairs if self.pairs else None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference."""
        return paired_difference_interval(self.both, self.only_first, self.only_second, self.neither)

    @property
    def p_value(self) -> float:
        """Exact two-sided p-value of "both are equally good"."""
        return exact_paired_p(self.only_first, self.only_second)

    @classmethod
    def of(cls, name: str, pairs: Iterable[tuple[EpisodeRecord, EpisodeRecord]]) -> Comparison:
        """Count `pairs` of records of the same episode."""
        pairs = list(pairs)
        valid = [(a, b) for a, b in pairs if ERROR not in (a.status, b.status)]
        return cls(
            name,
            both=sum(a.success and b.success for a, b in valid),
            only_first=sum(a.success and not b.success for a, b in valid),
            only_second=sum(b.success and not a.success for a, b in valid),
            neither=sum(not a.success and not b.success for a, b in valid),
            dropped=len(pairs) - len(valid),
        )


def compare(config: CompareConfig) -> None:
    """Run `vla eval compare`; raise `UserError` if the two evaluations cannot be compared."""
    rows = compare_folders(config.first, config.second)
    _print(rows, config)
    if config.json is not None:
        content = [
            asdict(row) | {"difference": row.difference, "interval": row.interval, "p_value": row.p_value}
            for row in rows
        ]
        write_text(config.json, json.dumps(content, indent=1) + "\n")


def compare_folders(first: Path, second: Path) -> list[Comparison]:
    """Return one comparison per task in the order of the plan, then that of all episodes."""
    plan = Plan.load(first)
    problems = plan.question_differences(Plan.load(second))
    if problems:
        raise UserError(
            f"{first} and {second} cannot be compared, their plans differ: {'; '.join(problems)}. Evaluate "
            "both with the same suites, tasks, initial states and step limits."
        )
    a, b = _complete(first, plan), _complete(second, plan)
    rows = [
        Comparison.of(
            f"{task.suite} {task.task}: {task.language}",
            (
                (a[episode], b[episode])
                for episode in plan.episodes
                if (episode.suite, episode.task) == (task.suite, task.task)
            ),
        )
        for task in plan.tasks
    ]
    return [*rows, Comparison.of("total", ((a[episode], b[episode]) for episode in plan.episodes))]


def _complete(folder: Path, plan: Plan) -> dict[Episode, EpisodeRecord]:
    records = {record.episode: record for record in read_records(folder)}
    missing = [episode for episode in plan.episodes if episode not in records]
    if missing:
        raise UserError(
            f"{folder} is not finished: {len(missing)} of {len(plan.episodes)} episodes have no result; "
            "finish it with `vla eval --resume`."
        )
    return records


def _print(rows: list[Comparison], config: CompareConfig) -> None:
    table = Table(title=f"{config.first} (1) against {config.second} (2)", title_justify="left")
    table.add_column("task", min_width=16)
    for heading in ("pairs", "(1) %", "(2) %", "(2) - (1), 95 %", "only\n(1)", "only\n(2)", "p\nexact"):
        table.add_column(heading, justify="right")
    for row in rows:
        last = row is rows[-1]
        if last:
            table.add_section()
        table.add_row(*_cells(row), style="bold" if last else None)
    console = Console()
    console.print(table)
    if rows[-1].dropped:
        console.print(f"{rows[-1].dropped} pairs are left out: an episode of theirs ended in an error.")


def _cells(row: Comparison) -> list[str]:
    low, high = row.interval
    known = row.pairs > 0
    return [
        row.name,
        str(row.pairs),
        f"{100 * (row.both + row.only_first) / row.pairs:.1f}" if known else "–",
        f"{100 * (row.both + row.only_second) / row.pairs:.1f}" if known else "–",
        f"{100 * row.difference:+.1f} ({100 * low:+.1f}, {100 * high:+.1f})" if known else "–",
        str(row.only_first),
        str(row.only_second),
        f"{row.p_value:.3g}",
    ]

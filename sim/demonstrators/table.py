"""``vla demonstrate``: how often the scripted demonstrators succeed, per task, with confidence intervals."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import binomtest

from vla.atomic import write_text
from vla.errors import UserError

from ..episode import Episode, demonstration_seed, held_out_seed
from ..suites import load_suite
from ..worlds import world_of
from .style import CLEAN, DEFAULT


@dataclass(frozen=True)
class DemonstratorTableConfig:
    """Run the demonstrators on random resets of every task and print a table of their success."""

    out: Path
    """Folder for the episode records and `table.json`."""
    suites: tuple[str, ...] = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    """Suites to run."""
    tasks: tuple[int, ...] = ()
    """Task indices; all tasks of each suite if empty."""
    episodes: int = 10
    """Random resets per task."""
    seed: int = 0
    """Seed of the resets and of the demonstrators' choices."""
    held_out: bool = True
    """Draw the resets from the held-out range, which demonstrations for training never use."""
    clean: bool = False
    """Demonstrate without any randomisation."""
    action_noise: float = 0.0
    """Standard deviation of the noise in bursts on executed actions (see `Style`)."""
    workers: int = 1
    """Processes; each simulates one task at a time."""
    resume: bool = False
    """Continue in a folder that has records, keeping them."""


@dataclass(frozen=True)
class Row:
    """One episode's record."""

    suite: str
    task: int
    index: int
    episode_seed: int
    success: bool
    steps: int
    reason: str


@dataclass(frozen=True)
class _Job:
    """The episodes of one task that have no record yet."""

    config: DemonstratorTableConfig
    suite: str
    task: int
    missing: tuple[int, ...]

    @property
    def path(self) -> Path:
        return self.config.out / "episodes" / f"{self.suite}_{self.task:02d}.jsonl"


def demonstrator_table(config: DemonstratorTableConfig) -> None:
    """Run what is missing, then print the table and write ``table.json``.

    Raises `UserError` for an unknown suite or task, and for an output folder in use.
    """
    jobs = _jobs(config)
    (config.out / "episodes").mkdir(parents=True, exist_ok=True)
    work = [job for job in jobs if job.missing]
    context = multiprocessing.get_context("spawn")  # a fork would share the simulator's OpenGL state
    with context.Pool(max(1, config.workers), maxtasksperchild=1) as pool:
        for _ in track(pool.imap_unordered(_run, work), "Demonstrating", total=len(work)):
            pass
    rows = [row for job in jobs for row in _records(job.path)]
    summary = summarise(rows)
    versions = {package: it for name in config.suites for package, it in world_of(name).versions().items()}
    content = {"config": asdict(config), "versions": versions, "tasks": summary}
    write_text(config.out / "table.json", json.dumps(content, indent=2, default=str) + "\n")
    _print(summary)


def summarise(rows: list[Row]) -> list[dict]:
    """Return one entry per task: successes, Wilson 95 % interval, mean and largest steps of successes."""
    summary = []
    for suite, task in sorted({(row.suite, row.task) for row in rows}):
        mine = [row for row in rows if (row.suite, row.task) == (suite, task)]
        steps = [row.steps for row in mine if row.success]
        summary.append(
            {
                "suite": suite,
                "task": task,
                "language": load_suite(suite).task(task).language,
                **_rate(len(steps), len(mine)),
                "mean_steps": sum(steps) / len(steps) if steps else None,
                "max_steps": max(steps, default=None),
                "failures": sorted(f"{row.index}: {row.reason}" for row in mine if not row.success),
            }
        )
    return summary


def _rate(successes: int, episodes: int) -> dict:
    interval = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    return {
        "successes": successes,
        "episodes": episodes,
        "rate": successes / episodes,
        "interval": [float(interval.low), float(interval.high)],
    }


def _jobs(config: DemonstratorTableConfig) -> list[_Job]:
    folder = config.out / "episodes"
    if folder.exists() and any(folder.iterdir()) and not config.resume:
        raise UserError(
            f"{config.out} already has records; pass --resume to continue or choose another --out."
        )
    jobs = []
    for name in config.suites:
        suite = load_suite(name)
        for task in config.tasks or range(len(suite.tasks)):
            suite.task(task)  # raises for an unknown index
            job = _Job(config, name, task, ())
            done = {row.index for row in _records(job.path)}
            jobs.append(replace(job, missing=tuple(i for i in range(config.episodes) if i not in done)))
    return jobs


def _records(path: Path) -> Iterator[Row]:
    """Read a task's records; a line cut short by a kill is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield Row(**json.loads(line))
        except json.JSONDecodeError:
            continue


def _run(job: _Job) -> None:
    """Demonstrate a task's missing episodes, one record each (in a process of its own)."""
    world = world_of(job.suite)
    style = replace(CLEAN if job.config.clean else DEFAULT, action_noise=job.config.action_noise)
    draw = held_out_seed if job.config.held_out else demonstration_seed
    with world.simulate(job.suite, job.task) as sim, job.path.open("a") as records:
        for index in job.missing:
            seed = draw(job.config.seed, job.suite, job.task, index)
            episode = Episode(job.suite, job.task, None, seed)
            result = world.demonstrate(sim, episode, seed=seed, style=style)
            row = Row(job.suite, job.task, index, seed, result.success, result.steps, result.reason)
            records.write(json.dumps(asdict(row)) + "\n")
            records.flush()


def _print(summary: list[dict]) -> None:
    table = Table(title="Scripted demonstrators, random resets")
    for column in ("suite", "task", "instruction", "success", "95 % interval", "steps", "longest"):
        table.add_column(column, justify="left" if column in ("suite", "instruction") else "right")
    for name in dict.fromkeys(entry["suite"] for entry in summary):
        mine = [entry for entry in summary if entry["suite"] == name]
        for entry in mine:
            table.add_row(name, str(entry["task"]), entry["language"], *_cells(entry))
        table.add_row(name, "all", "", *_cells(_total(mine)), end_section=True)
    table.add_row("all", "", "", *_cells(_total(summary)))
    Console().print(table)


def _total(entries: list[dict]) -> dict:
    solved = [entry for entry in entries if entry["successes"]]
    successes = sum(entry["successes"] for entry in entries)
    steps = sum(entry["mean_steps"] * entry["successes"] for entry in solved)
    return {
        **_rate(successes, sum(entry["episodes"] for entry in entries)),
        "mean_steps": steps / successes if successes else None,
        "max_steps": max((entry["max_steps"] for entry in solved), default=None),
    }


def _cells(entry: dict) -> tuple[str, ...]:
    low, high = entry["interval"]
    steps = "-" if entry["mean_steps"] is None else f"{entry['mean_steps']:.0f}"
    longest = "-" if entry["max_steps"] is None else str(entry["max_steps"])
    return f"{entry['successes']}/{entry['episodes']}", f"{low:.0%} to {high:.0%}", steps, longest

"""`vla collect`: scripted demonstrations from random resets into a LeRobotDataset v3.

Attempt `i` at a task is decided by the seed alone, and an attempt is started only while the successes
and the attempts under way are fewer than the episodes wanted. So the demonstrations of a task are
exactly its first successes, whatever the number of workers or their speed, and none is thrown away.

Everything grows in ``OUT.partial``, one folder per attempt that appears whole; the dataset is built there
when all attempts are in, and moved to ``OUT``. A killed run loses at most the attempts under way.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vla import __version__
from vla.atomic import write_text
from vla.errors import UserError
from vla.json_file import load_json
from vla.selection import parse_indices
from vla.sim.collection_workers import AttemptSchedule, WorkerPool, WorkOrder
from vla.sim.contact_sheet import CONTACT_SHEET, draw_contact_sheet
from vla.sim.demonstrators.style import Style
from vla.sim.recording import ATTEMPT_FILE, PROVENANCE_FILE
from vla.sim.suites import Suite, load_suite
from vla.sim.worlds import world_of

PLAN_FILE = "plan.json"
#: Attempts allowed per wanted episode before a task is given up as not demonstrable.
ATTEMPTS_PER_EPISODE = 5


@dataclass(frozen=True)
class CollectConfig:
    """Record scripted demonstrations as a LeRobotDataset."""

    suite: str
    """LIBERO or LIBERO-PRO suite, for example libero_object, or so101_tabletop."""
    out: Path
    """Folder of the new dataset."""
    tasks: str | None = None
    """Task indices, for example 0,3 or 0-4; all tasks of the suite by default."""
    episodes_per_task: int = 50
    """Successful demonstrations to keep per task."""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Simulator processes; each takes about 1.6 GB of memory."""
    image_size: int = 256
    """Height and width of both cameras, in pixels."""
    seed: int = 0
    """Decides every reset and every random choice of the demonstrators."""
    style: tyro.conf.OmitArgPrefixes[Style] = field(default_factory=lambda: Style(action_noise=0.3))
    """How the demonstrators vary, and how much noise they recover from."""
    resume: bool = False
    """Go on with a collection that was interrupted."""
    overwrite: bool = False
    """Replace an existing dataset, once the new one is complete."""


def collect(config: CollectConfig) -> None:
    """Record `config.episodes_per_task` successful demonstrations of every task and write the dataset.

    Raises `UserError` for an unknown suite or task, an existing output, a task that cannot be
    demonstrated, and a collection that is resumed with other settings.
    """
    suite = load_suite(config.suite)
    tasks = sorted(parse_indices(config.tasks, len(suite.tasks), f"{suite.name} has no task"))
    for name, least in (("episodes_per_task", 1), ("workers", 1), ("image_size", 16)):
        if getattr(config, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}.")
    partial = config.out.with_name(config.out.name + ".partial")
    if not _needs_work(config, tasks, partial):
        return
    with _locked(partial):
        _prepare(config, partial)
        schedules = _record(config, suite, tasks, partial)
        _publish(config, suite, schedules, partial)
    shutil.rmtree(partial)
    episodes = sum(len(schedule.kept) for schedule in schedules.values())
    print(f"Wrote {config.out}: {episodes} demonstrations (tasks: {len(tasks)}); see {CONTACT_SHEET}.")


# ---------------------------------------------------------------------- the output folder


def _plan(config: CollectConfig) -> dict:
    """What decides a demonstration, besides its task and attempt number."""
    return {
        "suite": config.suite,
        "seed": config.seed,
        "image_size": config.image_size,
        "style": json.loads(json.dumps(asdict(config.style))),
        "versions": world_of(config.suite).versions(),
    }


def _needs_work(config: CollectConfig, tasks: Sequence[int], partial: Path) -> bool:
    """Check what exists at the output; return False if a resumed collection is complete already."""
    if partial.exists() and not (config.resume or config.overwrite):
        raise UserError(
            f"{partial} holds an interrupted collection; go on with --resume or start again with --overwrite."
        )
    if not config.out.exists() or (config.out.is_dir() and not any(config.out.iterdir())):
        return True
    is_dataset = (config.out / "meta" / "info.json").exists()
    if config.overwrite and is_dataset:
        return True
    if config.overwrite:
        raise UserError(
            f"{config.out} is not a dataset, so --overwrite leaves it alone; choose another --out."
        )
    if config.resume and is_dataset and _is_complete(config, tasks):
        print(f"{config.out} is complete already.")
        shutil.rmtree(partial, ignore_errors=True)  # all that was left to do when the run was killed
        return False
    raise UserError(f"{config.out} exists already; choose another --out or replace it with --overwrite.")


def _is_complete(config: CollectConfig, tasks: Sequence[int]) -> bool:
    provenance = _read_json(config.out / PROVENANCE_FILE)
    _require_same_plan(provenance, config, config.out)
    recorded = {task["task"]: len(task["kept"]) for task in provenance["tasks"]}
    return recorded == dict.fromkeys(tasks, config.episodes_per_task)


def _read_json(path: Path) -> dict:
    absent = f"{path} does not exist; start again with --overwrite."
    return load_json(path, absent=absent, remedy="start again with --overwrite")


def _require_same_plan(plan: Mapping, config: CollectConfig, where: Path) -> None:
    different = [key for key, value in _plan(config).items() if plan.get(key) != value]
    if different:
        raise UserError(
            f"{where} was recorded with another {' and '.join(different)}; resume with the same settings or "
            "start again with --overwrite."
        )


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Hold `partial` for this process alone; the lock ends with the process, however it ends."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = (partial / "lock").open("w")
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"Cannot write to {partial} ({error.strerror}); choose another --out.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another collection is writing {partial}; wait for it or choose another --out."
            ) from None
        yield


def _prepare(config: CollectConfig, partial: Path) -> None:
    """Check or write the plan, and sweep up what a killed run left half-written."""
    plan = partial / PLAN_FILE
    if config.overwrite and not config.resume:
        for path in partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        plan.unlink(missing_ok=True)
    if plan.exists():
        _require_same_plan(_read_json(plan), config, partial)
    else:
        write_text(plan, json.dumps(_plan(config), indent=2) + "\n")
    for leftover in partial.glob("attempts/*/.attempt_*"):
        shutil.rmtree(leftover, ignore_errors=True)


# ---------------------------------------------------------------------- recording and publishing


def _record(
    config: CollectConfig, suite: Suite, tasks: Sequence[int], partial: Path
) -> dict[int, AttemptSchedule]:
    """Make the attempts that are still missing and return every task's complete schedule."""
    from vla.sim.dataset import video_settings  # LeRobot and torch take seconds to import

    interface = world_of(suite.name).interface(config.image_size)
    video = video_settings(int(interface.control_rate))
    order = WorkOrder(suite.name, config.seed, config.style, config.image_size, video, partial / "attempts")
    schedules = {}
    for task in tasks:
        order.attempt_folder(task, 0).parent.mkdir(parents=True, exist_ok=True)
        outcomes = _read_outcomes(order.attempt_folder(task, 0).parent)
        limit = ATTEMPTS_PER_EPISODE * config.episodes_per_task
        schedules[task] = AttemptSchedule(config.episodes_per_task, limit, outcomes)
    with _progress(suite, schedules) as finished:
        WorkerPool(order, config.workers, finished).run(schedules)
    for task, schedule in schedules.items():
        if len(schedule.kept) < schedule.wanted:
            raise UserError(
                f"Task {task} of {suite.name} ({suite.tasks[task].language!r}) was demonstrated only "
                f"{len(schedule.kept)} times in {schedule.limit} attempts; resume with fewer "
                "--episodes-per-task or leave it out with --tasks."
            )
    return schedules


def _read_outcomes(folder: Path) -> dict[int, bool]:
    """Return the outcome of every attempt recorded in a task's folder."""
    return {
        int(path.name.removeprefix("attempt_")): _read_json(path / ATTEMPT_FILE)["success"]
        for path in folder.glob("attempt_*")
    }


@contextmanager
def _progress(
    suite: Suite, schedules: Mapping[int, AttemptSchedule]
) -> Iterator[Callable[[int, int, bool], None]]:
    """Show one bar per task and one for all; yield the function that moves them."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns) as progress:
        wanted = sum(schedule.wanted for schedule in schedules.values())
        total = progress.add_task(f"{suite.name}, all tasks", total=wanted, note="")
        bars = {
            task: progress.add_task(
                f"{task} {suite.tasks[task].language[:48]}", total=schedule.wanted, note=""
            )
            for task, schedule in schedules.items()
        }

        def show(task: int) -> None:
            schedule = schedules[task]
            note = f"{len(schedule.outcomes)} attempts"
            progress.update(bars[task], completed=len(schedule.kept), note=note)
            progress.update(total, completed=sum(len(s.kept) for s in schedules.values()))

        for task in schedules:
            show(task)
        yield lambda task, attempt, success: show(task)


def _publish(
    config: CollectConfig, suite: Suite, schedules: Mapping[int, AttemptSchedule], partial: Path
) -> None:
    """Assemble the dataset inside `partial` and move it into place."""
    from vla.sim.dataset import assemble

    attempts = partial / "attempts"
    kept = {
        task: [attempts / f"task_{task:02d}" / f"attempt_{k:05d}" for k in schedule.kept]
        for task, schedule in schedules.items()
    }
    dataset = partial / "dataset"
    if dataset.exists():
        shutil.rmtree(dataset)
    assemble(
        list(kept.values()),
        world_of(suite.name),
        config.image_size,
        _provenance(config, suite, schedules),
        dataset,
        name=f"cogmerge/{config.out.name}",
    )
    first = [folders[0] for folders in kept.values()]
    draw_contact_sheet([(_read_json(folder / ATTEMPT_FILE)["language"], folder) for folder in first], dataset)
    if config.out.exists():
        os.replace(config.out, partial / "replaced")
    os.replace(dataset, config.out)


def _provenance(config: CollectConfig, suite: Suite, schedules: Mapping[int, AttemptSchedule]) -> dict:
    """Return how the dataset came about, for ``meta/cogmerge.json``."""
    tasks = [
        {
            "task": task,
            "language": suite.tasks[task].language,
            "attempts": len(schedule.outcomes),
            "successes": sum(schedule.outcomes.values()),
            "kept": schedule.kept,
        }
        for task, schedule in schedules.items()
    ]
    return _plan(config) | {
        "generator": f"vla collect {__version__}",
        "action_space": world_of(suite.name).interface(config.image_size).action_space,
        "tasks": tasks,
    }

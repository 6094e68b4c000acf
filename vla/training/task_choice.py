"""``vla train --tasks`` and ``--without-tasks``: training on a part of a dataset, chosen by instruction.

A task is named by its words and not by its number: a dataset numbers its tasks in the order in which they
came, which is the order of a benchmark's suite only by chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pyarrow.dataset as arrow_dataset
from lerobot.datasets.compute_stats import aggregate_stats

from vla.errors import UserError, nearest
from vla.training.dataset import Demonstrations

Statistics = dict[str, dict[str, np.ndarray]]


def choose_tasks(
    datasets: Sequence[Demonstrations], tasks: Sequence[str] = (), without: Sequence[str] = ()
) -> list[Demonstrations]:
    """Keep of every dataset the tasks that match `tasks` (all, if there are none) and not `without`.

    An entry is an instruction word for word or a glob (``put the bowl*``); case does not count. Frames stay
    numbered as they are, so a part shares the whole's frame cache. Statistics become those of the episodes
    that remain. Raises `UserError` for an entry that matches nothing and a dataset of which nothing remains.
    """
    known = {text for dataset in datasets for text in dataset.chosen_instructions}
    for option, patterns in (("--tasks", tasks), ("--without-tasks", without)):
        for pattern in patterns:
            _require_match(option, pattern, known)
    return [_part(dataset, tasks, without) for dataset in datasets]


def keep_instructions(dataset: Demonstrations, instructions: Iterable[str]) -> Demonstrations:
    """The tasks of `dataset` whose instruction is one of these, word for word; all if it has none of them."""
    wanted = set(instructions)
    chosen = tuple(task for task in dataset.chosen if dataset.instructions[task] in wanted)
    return _restricted(dataset, chosen or dataset.chosen)


def _part(dataset: Demonstrations, tasks: Sequence[str], without: Sequence[str]) -> Demonstrations:
    chosen = tuple(
        task
        for task in dataset.chosen
        if (not tasks or _matches(dataset.instructions[task], tasks))
        and not _matches(dataset.instructions[task], without)
    )
    if not chosen:
        raise UserError(
            f"No task of the dataset at {dataset.root} is left to train on; leave it out of --dataset, or"
            " change --tasks and --without-tasks."
        )
    return _restricted(dataset, chosen)


def _restricted(dataset: Demonstrations, chosen: tuple[int, ...]) -> Demonstrations:
    if chosen == dataset.chosen:
        return dataset
    part = replace(dataset, chosen=chosen)
    return replace(part, statistics=_statistics_of(part))


def _statistics_of(part: Demonstrations) -> Statistics:
    """Aggregate the episodes' own statistics, as LeRobot does for the whole dataset."""
    keys = tuple(part.statistics)
    rows = _episode_statistics(part.root, keys)
    episodes = np.unique(part.episode[part.chosen_frames])
    missing = [int(episode) for episode in episodes if int(episode) not in rows]
    if missing:
        raise UserError(
            f"{part.root / 'meta' / 'episodes'} has no statistics of episode {missing[0]}, so a part of the"
            " dataset cannot be normalised; train on all of it, or collect it again."
        )
    return aggregate_stats([rows[int(episode)] for episode in episodes])


def _episode_statistics(root: Path, keys: Sequence[str]) -> dict[int, Statistics]:
    """Statistics of every episode by index, from ``meta/episodes``; episodes that lack one are left out."""
    files = sorted((root / "meta" / "episodes").rglob("*.parquet"))
    table = arrow_dataset.dataset(files, format="parquet").to_table()
    prefixes = tuple(f"stats/{key}/" for key in keys)
    columns = [name for name in table.column_names if name.startswith(prefixes)]
    present = {name.split("/")[1] for name in columns}
    result = {}
    for row in table.select(["episode_index", *columns]).to_pylist():
        if present != set(keys) or any(row[name] is None for name in columns):
            continue
        statistics: Statistics = {key: {} for key in keys}
        for name in columns:
            _, key, kind = name.split("/")
            statistics[key][kind] = np.atleast_1d(np.array(row[name]))
        result[row["episode_index"]] = statistics
    return result


def _require_match(option: str, pattern: str, known: Iterable[str]) -> None:
    if not any(_matches(text, (pattern,)) for text in known):
        raise UserError(
            f"{option} '{pattern}' matches no task of the dataset.{nearest(pattern, known)} An entry is an"
            " instruction word for word, or a glob such as 'put the bowl*'."
        )


def _matches(instruction: str, patterns: Iterable[str]) -> bool:
    text = instruction.casefold()
    return any(text == p.casefold() or fnmatchcase(text, p.casefold()) for p in patterns)

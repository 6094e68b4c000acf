"""Read everything but the pixels of a LeRobotDataset v3 into memory, checked.

States and actions of a million frames are about 60 MB, so they are plain arrays; only the needed
columns are read (a row of a collected dataset also holds the simulator state). Pixels are the
business of `frame_cache`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as arrow_dataset
from lerobot.datasets.compute_stats import aggregate_stats
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

from vla.contract import ACTION_KEY, STATE_KEY, Interface
from vla.errors import UserError
from vla.json_file import load_json

_INDEX_COLUMNS = ("index", "timestamp", "episode_index", "task_index")


@dataclass(frozen=True)
class Demonstrations:
    """A dataset without its pixels. `n` frames, in the order of LeRobot's global frame index.

    `state` (n, s) and `action` (n, d) are float32, `timestamp` (n,) float64 seconds from the start of
    the episode, `episode` and `task` (n,) int64. Frame `i` belongs to the frames
    ``[episode_start[i], episode_end[i])``. `instructions` holds the text of every task index. `chosen` are
    the indices of the tasks to train on, and `statistics` are of their episodes: see
    `vla.training.task_choice`.
    """

    root: Path
    info: dict[str, Any]
    meta: LeRobotDatasetMetadata
    interface: Interface
    statistics: dict[str, dict[str, np.ndarray]]
    state: np.ndarray | None
    action: np.ndarray
    timestamp: np.ndarray
    episode: np.ndarray
    task: np.ndarray
    episode_start: np.ndarray
    episode_end: np.ndarray
    instructions: tuple[str, ...]
    chosen: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.action)

    @cached_property
    def chosen_frames(self) -> np.ndarray:
        """Frames of the chosen tasks, ascending."""
        return np.flatnonzero(np.isin(self.task, self.chosen))

    @property
    def chosen_instructions(self) -> tuple[str, ...]:
        """Text of the chosen tasks."""
        return tuple(self.instructions[task] for task in self.chosen)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the metadata (statistics included) and the name and size of every data file."""
        digest = hashlib.sha256()
        for path in _files(self.root / "meta"):
            digest.update(path.read_bytes())
        for path in _files(self.root / "data") + _files(self.root / "videos"):
            digest.update(f"{path.relative_to(self.root)} {path.stat().st_size}".encode())
        return digest.hexdigest()


def open_demonstrations(
    root: Path, *, action_space: str | None = None, control_rate: float | None = None
) -> Demonstrations:
    """Open the LeRobotDataset v3 in the folder `root`.

    `action_space` and `control_rate` (Hz) say what the metadata of foreign datasets does not, or says
    wrongly. Raises `UserError` when the folder is absent, in an older format, or lacks what training needs.
    """
    root = Path(root)
    info = _read_info(root)
    interface = Interface.from_dataset(info, action_space=action_space)
    if control_rate is not None:
        interface = replace(interface, control_rate=float(control_rate))
    meta = LeRobotDatasetMetadata(root.name, root=root)
    columns = _read_columns(root, interface)
    start, end = _episode_bounds(columns["episode_index"])
    return Demonstrations(
        root=root,
        info=info,
        meta=meta,
        interface=interface,
        statistics=_statistics(meta, interface, root),
        state=columns.get(STATE_KEY),
        action=columns[ACTION_KEY],
        timestamp=columns["timestamp"],
        episode=columns["episode_index"],
        task=columns["task_index"],
        episode_start=start,
        episode_end=end,
        instructions=tuple(map(str, meta.tasks.sort_values("task_index").index)),
        chosen=tuple(map(int, np.unique(columns["task_index"]))),
    )


def joint_statistics(datasets: Sequence[Demonstrations]) -> dict[str, dict[str, np.ndarray]]:
    """Return the normalisation statistics of several datasets taken together."""
    if len(datasets) == 1:
        return datasets[0].statistics
    return aggregate_stats([dataset.statistics for dataset in datasets])


def require_same_interface(datasets: Sequence[Demonstrations]) -> None:
    """Raise `UserError` unless all datasets speak the interface of the first."""
    first = datasets[0]
    for other in datasets[1:]:
        if other.interface != first.interface:
            raise UserError(
                f"The datasets {first.root} and {other.root} cannot be mixed: "
                f"{_first_difference(first.interface, other.interface)}."
            )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _first_difference(a: Interface, b: Interface) -> str:
    for name in ("cameras", "state", "action", "action_space", "control_rate"):
        if getattr(a, name) != getattr(b, name):
            return f"their {name} differ ({getattr(a, name)} and {getattr(b, name)})"
    return "they are equal"


def _read_info(root: Path) -> dict[str, Any]:
    absent = (
        f"There is no LeRobotDataset at {root} (no meta/info.json); give a folder written by "
        "`vla collect` or downloaded from the Hub."
    )
    info = load_json(root / "meta" / "info.json", absent=absent, remedy="copy the dataset again")
    version = str(info.get("codebase_version", "unknown"))
    if not version.startswith("v3"):
        raise UserError(
            f"The dataset at {root} has format {version}, this release reads v3.0; convert it with "
            "`python -m lerobot.scripts.convert_dataset_v21_to_v30`."
        )
    if not info.get("total_frames"):
        raise UserError(f"The dataset at {root} holds no frame; collect demonstrations first.")
    return info


def _read_columns(root: Path, interface: Interface) -> dict[str, np.ndarray]:
    keys = [ACTION_KEY] + ([STATE_KEY] if interface.state else [])
    files = sorted((root / "data").rglob("*.parquet"))
    if not files:
        raise UserError(f"The dataset at {root} has metadata but no data/*.parquet; copy it completely.")
    try:
        table = arrow_dataset.dataset(files, format="parquet").to_table(columns=[*_INDEX_COLUMNS, *keys])
    except (OSError, ValueError) as error:  # truncated files and absent columns
        raise UserError(f"The data files in {root / 'data'} cannot be read: {error}.") from None
    order = np.argsort(table["index"].to_numpy(), kind="stable")
    columns = {name: table[name].to_numpy()[order] for name in _INDEX_COLUMNS}
    for key, vector in zip(keys, (interface.action, interface.state), strict=False):
        flat = table[key].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        columns[key] = flat.reshape(len(table), vector.dim)[order]
    if not np.array_equal(columns["index"], np.arange(len(table))):
        raise UserError(f"The frames of the dataset at {root} are not numbered 0..n-1; it is damaged.")
    for key in keys:
        if not np.isfinite(columns[key]).all():
            bad = int(np.flatnonzero(~np.isfinite(columns[key]).all(axis=1))[0])
            raise UserError(f"Frame {bad} of the dataset at {root} has a non-finite '{key}'; remove it.")
    return columns


def _episode_bounds(episode: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per frame, the first frame of its episode and one past the last."""
    starts = np.flatnonzero(np.r_[True, episode[1:] != episode[:-1]])
    lengths = np.diff(np.r_[starts, len(episode)])
    return np.repeat(starts, lengths), np.repeat(starts + lengths, lengths)


def _statistics(meta: LeRobotDatasetMetadata, interface: Interface, root: Path) -> dict:
    keys = [ACTION_KEY] + ([STATE_KEY] if interface.state else [])
    missing = [key for key in keys if key not in (meta.stats or {})]
    if missing:
        raise UserError(
            f"{root / 'meta' / 'stats.json'} has no statistics for {', '.join(missing)}; recompute them "
            "with `lerobot-edit-dataset --operation.type recompute_stats`."
        )
    return meta.stats

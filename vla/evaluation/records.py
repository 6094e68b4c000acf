"""One row per episode in ``episodes.jsonl``: appended, flushed, and repaired after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from vla.atomic import write_text
from vla.errors import UserError
from vla.sim.episode import Episode

EPISODES_FILE = "episodes.jsonl"
SUCCESS, FAILURE, ERROR = "success", "failure", "error"


@dataclass(frozen=True)
class EpisodeRecord:
    """The result of one episode.

    `status` is "success" or "failure" of the policy, or "error" when the episode could not be carried
    through (a dead worker, unstable physics); `success` is then None. `steps` are control steps, of
    which the policy was asked in `queries`. Times are in seconds: `wall_s` from reset to end,
    `policy_s` inside the policy. `attempts` is 2 after a retry and `errors` says what went wrong.
    `worker_rss_mb` is the worker's resident memory after the episode, in MB (10^6 bytes). `route` is there
    for policies of several experts: see `vla.evaluation.task_routed.TaskRoutedPolicy.route`.
    """

    suite: str
    task: int
    init_state: int | None
    seed: int
    status: str
    success: bool | None
    steps: int
    queries: int
    wall_s: float
    policy_s: float
    worker_rss_mb: float
    checkpoint_hash: str
    versions: dict[str, str]
    attempts: int = 1
    errors: tuple[str, ...] = ()
    route: dict[str, Any] | None = None

    @property
    def episode(self) -> Episode:
        """The episode this is the result of."""
        return Episode(self.suite, self.task, self.init_state, self.seed)


class EpisodeLog:
    """``episodes.jsonl`` open for appending; a context manager.

    Opening reads what a previous run left, drops a torn last line and rows that ended in an error
    (they say nothing about the policy and are run again), and keeps the rest as `records`.
    Raises `UserError` if a row belongs to another evaluation or a line in the middle is damaged.
    """

    def __init__(self, folder: Path, episodes: Iterable[Episode], checkpoint_hash: str):
        self.path = Path(folder) / EPISODES_FILE
        kept = [record for record in read_records(folder) if record.status != ERROR]
        planned = set(episodes)
        foreign = [
            record
            for record in kept
            if record.episode not in planned or record.checkpoint_hash != checkpoint_hash
        ]
        if foreign:
            raise UserError(
                f"{self.path} has rows of another evaluation ({foreign[0].episode}); use --overwrite to "
                "start again."
            )
        self.records = list({record.episode: record for record in kept}.values())
        write_text(self.path, "".join(_line(record) for record in self.records))
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, record: EpisodeRecord) -> None:
        """Add a row; once this returns, the row survives a kill of this process."""
        self.records.append(record)
        self._file.write(_line(record))
        self._file.flush()

    def __enter__(self) -> EpisodeLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_records(folder: Path) -> list[EpisodeRecord]:
    """Read all whole rows of an evaluation folder, in the order in which they were finished.

    A last line without its line feed was torn by a kill and is left out. Raises `UserError` for any
    other damaged line.
    """
    path = Path(folder) / EPISODES_FILE
    if not path.exists():
        return []
    *lines, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _line(record: EpisodeRecord) -> str:
    return json.dumps(asdict(record)) + "\n"


def _parse(line: str, where: str) -> EpisodeRecord:
    known = {field.name for field in fields(EpisodeRecord)}
    try:
        content = json.loads(line)
        content.setdefault("route", None)  # absent from rows of the first release
        if content.keys() != known:
            raise KeyError(*sorted(content.keys() ^ known))
        return EpisodeRecord(**content | {"errors": tuple(content["errors"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where} is damaged ({error}); delete that line and use --resume, or start again with "
            "--overwrite."
        ) from None

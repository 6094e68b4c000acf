"""What an arm was asked, what it was sent and what it measured, cycle by cycle; written while it runs.

A record is a JSON-lines file: one header, then one line per control period in the form of `wire`. It grows as
``NAME.partial`` and becomes ``NAME`` when it is closed, so a file of the final name is whole. After a crash
the ``.partial`` reads back up to its last whole line.

Writing happens on a thread of its own: a slow or full disk never delays the arm. Times are of the monotonic
clock; the header pairs one of them with the wall clock.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla.errors import UserError

from .driver import DriverInfo
from .supervisor import Cycle
from .wire import cycle_from_json, info_from_json, info_to_json

FORMAT = "vla-arm-record/1"
FLUSH_EVERY = 0.25
"""Seconds of a run that a power cut may cost."""

BACKLOG = 10_000
"""Cycles that may wait for the disk before some are lost (and said to be)."""


class Recorder:
    """Appends to a record; a context manager. Raises `UserError` if the file cannot be begun.

    `trouble` is None as long as everything asked for is on its way to the disk, else a sentence.
    """

    def __init__(self, path: str | Path, info: DriverInfo):
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.trouble: str | None = None
        header = {
            "format": FORMAT,
            "info": info_to_json(info),
            "monotonic": time.monotonic(),
            "unix": time.time(),
        }
        if self.path.exists():
            raise UserError(f"There is already a record {self.path}: name another file.")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"The record {self.path} cannot be written ({error}).") from None
        try:
            self._file = open(self.partial, "x", encoding="utf-8")  # noqa: SIM115, closed by the thread
        except FileExistsError:
            raise UserError(
                f"A record {self.partial} was not finished: keep it or remove it, or name another file."
            ) from None
        except OSError as error:
            raise UserError(f"The record {self.path} cannot be written ({error}).") from None
        self._queue: queue.Queue[str | None] = queue.Queue(BACKLOG)
        self._queue.put(json.dumps(header))
        self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        self._thread.start()

    def add(self, cycle: Mapping[str, Any]) -> None:
        """Append a control period, as `wire.cycle_to_json` returns it. Never waits, never raises."""
        try:
            self._queue.put_nowait(json.dumps(cycle))
        except queue.Full:
            self.trouble = f"The disk is too slow for the record {self.path}: cycles are missing."

    def close(self) -> None:
        """Write what is left and give the file its final name; drop a record of nothing. Idempotent."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _write(self) -> None:
        """Take lines off the queue until None; after the first failure, only take them off."""
        try:
            with self._file as file:
                flushed, lines = time.monotonic(), 0
                while (line := self._queue.get()) is not None:
                    file.write(line + "\n")
                    lines += 1
                    if time.monotonic() - flushed > FLUSH_EVERY:
                        file.flush()
                        flushed = time.monotonic()
                file.flush()
                os.fsync(file.fileno())
            if lines > 1:
                os.replace(self.partial, self.path)
            else:
                self.partial.unlink()
        except OSError as error:
            self.trouble = f"The record {self.path} stopped ({error.strerror}); {self.partial} has the rest."
            while self._queue.get() is not None:
                pass


@dataclass(frozen=True)
class Record:
    """A record read back. `whole` is False for one whose program did not close it."""

    info: DriverInfo
    cycles: tuple[Cycle, ...]
    unix_of_monotonic: float
    whole: bool

    @property
    def times(self) -> np.ndarray:
        """Monotonic times of the cycles (s), (T,)."""
        return np.array([cycle.time for cycle in self.cycles])

    @property
    def asked(self) -> np.ndarray:
        """What the policy asked for, (T, J); NaN where it asked for nothing that is a number."""
        return np.array([[_number((it.asked or {}).get(n)) for n in self._names] for it in self.cycles])

    @property
    def sent(self) -> np.ndarray:
        """What went to the arm, (T, J); NaN where nothing did."""
        return self._rows([cycle.sent for cycle in self.cycles])

    @property
    def measured(self) -> np.ndarray:
        """What the arm measured in that cycle, (T, J); NaN where it gave no sample."""
        return self._rows([it.state.q if it.fresh and it.state is not None else None for it in self.cycles])

    @property
    def _names(self) -> tuple[str, ...]:
        return self.info.joint_names

    def _rows(self, vectors) -> np.ndarray:
        absent = np.full(len(self._names), np.nan)
        return np.array([absent if it is None else it for it in vectors]).reshape(-1, len(self._names))


def read_record(path: str | Path) -> Record:
    """Read a record back, a ``.partial`` too. Raises `UserError` if it is none, or damaged before its end."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The record {path} cannot be read ({error}).") from None
    whole = path.suffix != ".partial"
    if not whole:
        lines = lines[:-1]  # behind the last line's end: empty, or a line that a crash cut short
    try:
        header = json.loads(lines[0])
        if header["format"] != FORMAT:
            raise UserError(
                f"{path} is a record of format {header['format']!r}, this version reads {FORMAT}."
            )
        info = info_from_json(header["info"])
        unix_of_monotonic = header["unix"] - header["monotonic"]
        cycles = [cycle_from_json(json.loads(line)) for line in lines[1:] if line]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is not a record of an arm, or is damaged ({error!r}).") from None
    return Record(info, tuple(cycles), unix_of_monotonic, whole)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")

"""What a run leaves behind with ``--record DIR``.

arm.jsonl      every control period of the arm: asked, sent, measured (`robot_drivers.recorder`)
policy.jsonl   every answer of the policy: when it was asked, how long it took, state, chunk
run.json       checkpoint, contract, task, options, how it ended; written last
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla import __version__
from vla.atomic import write_text
from vla.errors import UserError
from vla.robot_drivers import Cycle
from vla.runtime.chunk_scheduling import Query
from vla.runtime.robot.control_loop import RunEnd, RunStatus
from vla.runtime.robot.policy_thread import Answer, Observation

ARM_FILE, POLICY_FILE, RUN_FILE = "arm.jsonl", "policy.jsonl", "run.json"


class RunRecord:
    """A listener of the control loop that writes to `folder`, which must be new or empty.

    Raises `UserError` if it is not, or cannot be written to.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        self.folder, self._facts = Path(folder), dict(facts)
        if self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} holds something already: name a new folder for the record.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / POLICY_FILE).open("x", encoding="utf-8")
        except OSError as error:
            raise UserError(f"The record {self.folder} cannot be written ({error.strerror}).") from None
        self._kept = False
        self._states: dict[int, list[float]] = {}
        self._began = {"unix": time.time(), "monotonic": time.monotonic()}

    @property
    def arm_file(self) -> Path:
        """Where the arm's own process writes its cycles."""
        return self.folder / ARM_FILE

    def keep(self) -> None:
        """Say that the run begins: from now on the record stays."""
        self._kept = True

    def discard(self) -> None:
        """Remove a record of nothing, so that the next attempt can have its name; a kept one stays."""
        if self._kept:
            return
        self._file.close()
        for name in (POLICY_FILE, ARM_FILE, f"{ARM_FILE}.partial"):
            (self.folder / name).unlink(missing_ok=True)
        self.folder.rmdir()

    def observed(self, query: Query, observation: Observation) -> None:
        """Keep the state until its answer is there."""
        self._states[query.number] = observation.state.tolist()

    def answered(self, answer: Answer) -> None:
        """Write one answer."""
        query = answer.query
        line = {
            "query": query.number,
            "time": query.time,
            "step": query.step,
            "seconds": answer.seconds,
            "state": self._states.pop(query.number, None),
            "chunk": None if answer.chunk is None else answer.chunk.tolist(),
            "error": None if answer.error is None else str(answer.error),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def asked_arm(self, now: float, setpoint: Mapping[str, float], cycle: Cycle) -> None:
        """The arm's own process records what it was asked."""

    def finish(self, end: RunEnd | None, status: RunStatus, ending: str) -> None:
        """Write ``run.json`` and close. `end` is None if the run ended by an exception."""
        self._file.close()
        content = self._facts | {
            "vla": __version__,
            "began": self._began,
            "end": None if end is None else {"reason": end.reason, "failed": end.failed},
            "arm": ending,
            "periods": status.periods,
            "missed": status.missed,
            "queries": status.queries,
            "late": status.late,
        }
        write_text(self.folder / RUN_FILE, json.dumps(content, indent=2) + "\n")

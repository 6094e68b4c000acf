"""``summary.json``: what the rows add up to, and where the numbers come from."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vla.atomic import write_text
from vla.evaluation.plan import Plan
from vla.evaluation.policy_source import PolicySource
from vla.evaluation.records import ERROR, EpisodeRecord
from vla.evaluation.rollout import versions
from vla.evaluation.statistics import CONFIDENCE, wilson_interval

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Score:
    """Successes among the `episodes` that ended as a success or failure; `errors` are not among them."""

    successes: int
    episodes: int
    errors: int

    @classmethod
    def of(cls, records: Iterable[EpisodeRecord]) -> Score:
        """Count `records`."""
        records = list(records)
        errors = sum(record.status == ERROR for record in records)
        return cls(sum(bool(record.success) for record in records), len(records) - errors, errors)

    @property
    def rate(self) -> float | None:
        """Success rate, None without a valid episode."""
        return self.successes / self.episodes if self.episodes else None

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson interval of the rate."""
        return wilson_interval(self.successes, self.episodes)

    def as_dict(self) -> dict[str, Any]:
        """The score as it stands in the file."""
        return {
            "successes": self.successes,
            "episodes": self.episodes,
            "rate": self.rate,
            "interval": list(self.interval),
            "errors": self.errors,
        }


def task_scores(plan: Plan, records: Sequence[EpisodeRecord]) -> list[Score]:
    """One score per task of the plan, in its order."""
    return [
        Score.of(record for record in records if (record.suite, record.task) == (task.suite, task.task))
        for task in plan.tasks
    ]


def summarise(
    plan: Plan, records: Sequence[EpisodeRecord], source: PolicySource, *, workers: int, wall_s: float
) -> dict[str, Any]:
    """Build the summary; `wall_s` is the time that the last run over this folder took."""
    valid = [record for record in records if record.status != ERROR]
    queries = sum(record.queries for record in valid)
    suites = dict.fromkeys(task.suite for task in plan.tasks)
    return {
        "total": Score.of(records).as_dict() | {"planned": len(plan.episodes)},
        "suites": {
            name: Score.of(record for record in records if record.suite == name).as_dict() for name in suites
        },
        "tasks": [
            {"suite": task.suite, "task": task.task, "language": task.language} | score.as_dict()
            for task, score in zip(plan.tasks, task_scores(plan, records), strict=True)
        ],
        "confidence": CONFIDENCE,
        "timing": {
            "workers": workers,
            "wall_s": round(wall_s, 1),
            "episode_s": _mean([record.wall_s for record in valid]),
            "policy_ms_per_query": _mean([1000 * sum(record.policy_s for record in valid) / max(queries, 1)]),
            "steps_per_episode": _mean([record.steps for record in valid]),
            "worker_rss_mb": max((record.worker_rss_mb for record in valid), default=None),
            "retried": sum(record.attempts > 1 for record in records),
        },
        "provenance": _provenance(plan, source),
    }


def save_summary(folder: Path, summary: dict[str, Any]) -> Path:
    """Write ``summary.json`` atomically and return its path."""
    return write_text(folder / SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")


def _provenance(plan: Plan, source: PolicySource) -> dict[str, Any]:
    return {
        "checkpoint": source.label,
        "checkpoint_hash": source.hash,
        "manifest": source.manifest,
        "plan_hash": plan.hash,
        "step_limits": plan.step_limits,
        "step_limit_protocol": plan.protocol,
        "n_action_steps": plan.n_action_steps,
        "scheduler": plan.scheduler,
        "policy_delay": plan.policy_delay,
        "engine": plan.engine,
        "image_size": plan.image_size,
        "command": shlex.join(["vla", *sys.argv[1:]]),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """The kind of machine, without its name."""
    return {"system": platform.platform(), "processor": _processor(), "cores": os.cpu_count()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 2) if values else None

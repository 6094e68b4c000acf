"""The plan: every episode, fixed and written down before the first one runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vla.atomic import write_text
from vla.errors import UserError, nearest
from vla.json_file import load_json
from vla.selection import parse_indices
from vla.sim.episode import BENCHMARK_SEEDS, Episode, benchmark_episode
from vla.sim.suites import load_suite

PLAN_FILE = "plan.json"
PLAN_VERSION = 1
#: Control steps that LIBERO's protocol waits before the policy takes over; not counted as steps.
SETTLE_STEPS = 10
#: A prime, so that `--seed` moves every episode's seed by a different amount modulo their range.
_SEED_STRIDE = 7919


@dataclass(frozen=True)
class PlannedTask:
    """What a report needs to know of one task."""

    suite: str
    task: int
    name: str
    language: str


@dataclass(frozen=True)
class Plan:
    """The episodes, how long each may take, and which policy acts how.

    `step_limits` maps a suite to its control steps; `protocol` names where they come from. The first
    block (episodes and limits) is the *question*; the rest says who answers it: `checkpoint_hash` at
    `image_size`, through the chunk scheduler `scheduler` with `n_action_steps` actions per query, each
    answer `policy_delay` control steps after its observation, computed by the runtime engine in mode
    `engine` or, if None, by the policy itself. Two evaluations are comparable when the
    question is the same.
    """

    episodes: tuple[Episode, ...]
    tasks: tuple[PlannedTask, ...]
    protocol: str
    step_limits: dict[str, int]
    checkpoint_hash: str
    n_action_steps: int
    image_size: int
    scheduler: str = "execute_all"
    policy_delay: int = 0
    engine: str | None = None

    @property
    def hash(self) -> str:
        """SHA-256 over the question: episodes (in any order), step limits and settling."""
        episodes = sorted(
            [episode.suite, episode.task, episode.init_state, episode.seed] for episode in self.episodes
        )
        question = [episodes, self.step_limits, SETTLE_STEPS]
        text = json.dumps(question, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, folder: Path) -> Path:
        """Write ``plan.json`` into `folder` atomically and return its path."""
        content = {"version": PLAN_VERSION, "hash": self.hash, "settle_steps": SETTLE_STEPS} | asdict(self)
        return write_text(Path(folder) / PLAN_FILE, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read ``plan.json``; raise `UserError` if it is absent, foreign or altered."""
        path = Path(folder) / PLAN_FILE
        absent = f"{path} does not exist: '{folder}' is not an evaluation folder."
        content = load_json(path, absent=absent, remedy="evaluate again")
        plan = _parse(content, path)
        if plan.hash != content["hash"]:
            raise UserError(f"{path} does not match its own hash: it was edited; evaluate again.")
        return plan

    def differences(self, other: Plan) -> list[str]:
        """One phrase per way in which `other` is not the same evaluation; empty if it is."""
        problems = self.question_differences(other)
        for field, words in (
            ("checkpoint_hash", "checkpoint"),
            ("n_action_steps", "executed actions per query"),
            ("image_size", "image size"),
            ("scheduler", "chunk scheduler"),
            ("policy_delay", "steps of policy delay"),
            ("engine", "engine"),
        ):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                problems.append(f"{words} {_short(mine)} against {_short(theirs)}")
        return problems

    def question_differences(self, other: Plan) -> list[str]:
        """Like `differences`, for the episodes and their step limits alone."""
        problems = []
        if self.step_limits != other.step_limits:
            problems.append(f"step limits {_limits(self)} against {_limits(other)}")
        mine, theirs = set(self.episodes), set(other.episodes)
        if mine != theirs:
            problems.append(
                f"{len(mine)} episodes against {len(theirs)}, of which {len(mine & theirs)} are the same"
            )
        return problems


def make_plan(
    *,
    suites: Iterable[str],
    tasks: str | None,
    init_states: str | None,
    episodes_per_task: int | None,
    seed: int,
    protocol: str,
    max_steps: int | None,
    checkpoint_hash: str,
    n_action_steps: int,
    image_size: int,
    scheduler: str = "execute_all",
    policy_delay: int = 0,
    engine: str | None = None,
) -> Plan:
    """Lay out the benchmark episodes: suite by suite, task by task, in the order of the initial states.

    `tasks` and `init_states` select by `parse_indices` (None selects all), `tasks` also suite by suite, as
    in ``"libero_goal:0,3 libero_10:1"``; `episodes_per_task` then takes the first so many. Raises `UserError`
    for an unknown suite, task or initial state.
    """
    episodes: list[Episode] = []
    planned: list[PlannedTask] = []
    limits: dict[str, int] = {}
    names = list(dict.fromkeys(suites))
    selected = _tasks_by_suite(tasks, names)
    for name in names:
        suite = load_suite(name)
        if suite.is_varied:
            raise UserError(
                f"Suite '{name}' has random resets only, which belong to training; measure on {suite.base} or"
                f" a LIBERO-PRO suite of it, such as {suite.base}_task."
            )
        limits[name] = min(suite.step_limit(protocol), max_steps or suite.step_limit(protocol))
        for index in parse_indices(selected[name], len(suite.tasks), f"{name} has no task"):
            task = suite.task(index)
            planned.append(PlannedTask(name, index, task.name, task.language))
            chosen = _choose_states(init_states, episodes_per_task, len(suite.init_states(index)), task.name)
            episodes += [_shifted(benchmark_episode(name, index, state), seed) for state in chosen]
    return Plan(
        tuple(episodes),
        tuple(planned),
        protocol,
        limits,
        checkpoint_hash,
        n_action_steps,
        image_size,
        scheduler,
        policy_delay,
        engine,
    )


def _tasks_by_suite(tasks: str | None, suites: Sequence[str]) -> dict[str, str | None]:
    """Each suite's own selection of tasks; None is all of them."""
    if tasks is None or ":" not in tasks:
        return dict.fromkeys(suites, tasks)
    selected: dict[str, str | None] = dict.fromkeys(suites)
    for entry in tasks.split():
        suite, colon, indices = entry.partition(":")
        if not colon or not indices:
            raise UserError(f"--tasks '{entry}' is malformed; write SUITE:TASKS, as in libero_goal:0,3.")
        if suite not in selected:
            raise UserError(f"--tasks names '{suite}', which is not in --suite.{nearest(suite, suites)}")
        if selected[suite] is not None:
            raise UserError(f"--tasks names '{suite}' twice; write its tasks in one entry.")
        selected[suite] = indices
    return selected


def episode_name(episode: Episode) -> str:
    """File name of what belongs to one episode."""
    return f"{episode.suite}-task{episode.task}-init{episode.init_state}"


def _choose_states(selection: str | None, limit: int | None, count: int, task: str) -> list[int]:
    states = parse_indices(selection, count, f"Task '{task}' has no initial state")
    if limit is not None and not 1 <= limit <= len(states):
        raise UserError(
            f"--episodes-per-task {limit} does not fit: {len(states)} initial states of task '{task}' are "
            f"selected, and each makes one episode."
        )
    return states[:limit]


def _shifted(episode: Episode, seed: int) -> Episode:
    moved = (episode.seed + seed * _SEED_STRIDE) % len(BENCHMARK_SEEDS) + BENCHMARK_SEEDS.start
    return replace(episode, seed=moved)


def _parse(content: Mapping[str, Any], path: Path) -> Plan:
    if content.get("version") != PLAN_VERSION or content.get("settle_steps") != SETTLE_STEPS:
        raise UserError(f"{path} was written by another release; evaluate again.")
    try:
        return Plan(
            episodes=tuple(Episode(**episode) for episode in content["episodes"]),
            tasks=tuple(PlannedTask(**task) for task in content["tasks"]),
            protocol=content["protocol"],
            step_limits=dict(content["step_limits"]),
            checkpoint_hash=content["checkpoint_hash"],
            n_action_steps=content["n_action_steps"],
            image_size=content["image_size"],
            scheduler=content.get("scheduler", "execute_all"),  # absent from plans of the first release
            policy_delay=content.get("policy_delay", 0),
            engine=content.get("engine"),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is malformed ({error!r}); evaluate again.") from None


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _limits(plan: Plan) -> str:
    return ", ".join(f"{suite} {steps}" for suite, steps in plan.step_limits.items())

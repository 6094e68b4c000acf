"""What all schedulers share: counting executed actions, one query at a time, and measuring its latency."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Query:
    """One question to the policy: `step` actions had been executed when it was asked, at `time` (s)."""

    number: int
    step: int
    time: float


@dataclass(frozen=True)
class Arrival:
    """What was measured when an answer came.

    `delay` actions were executed and `seconds` passed since its query; `used` of its actions are still
    ahead. With ``used == 0`` the answer was dropped: it came too late, or its query was given up.
    """

    delay: int
    seconds: float
    used: int


class ChunkScheduler(ABC):
    """See `vla.runtime.chunk_scheduling` for how it is used.

    Subclasses say when to ask (`_due`), what a new chunk does to the plan (`_accept`) and what the plan says
    (`_planned`). `starved` counts the periods without an action since `reset`.
    """

    def __init__(self, horizon: int):
        self.horizon = horizon
        self._queries = 0
        self.reset()

    @staticmethod
    @abstractmethod
    def default_horizon(chunk_size: int) -> int:
        """Return a sensible `horizon` for chunks of `chunk_size` actions."""

    def reset(self) -> None:
        """Forget the plan, the counts and the query under way: an episode starts."""
        self.step = 0
        self.starved = 0
        self._open: Query | None = None
        self._observed: int | None = None  # the step at which the newest chunk in use was observed
        self._now = -math.inf
        self._clear()

    @property
    def wants_observation(self) -> bool:
        """Whether the policy should be asked now. False while a query is under way."""
        if self._open is not None:
            return False
        return self._observed is None or self._planned(self.step) is None or self._due()

    def ask(self, now: float) -> Query:
        """Note that the observation of this moment goes to the policy.

        Raises `ValueError` while another query is under way.
        """
        if self._open is not None:
            raise ValueError(f"query {self._open.number} is under way: receive or abandon it first")
        self._tick(now)
        self._queries += 1
        self._open = Query(self._queries, self.step, now)
        return self._open

    def receive(self, query: Query, chunk: np.ndarray, now: float) -> Arrival:
        """Take the answer (K, D) to `query` into the plan and return the latency that was measured.

        Actions for steps that have been executed meanwhile are passed over. Raises `ValueError` if `chunk`
        is no array of finite numbers with at least one row.
        """
        self._tick(now)
        actions = np.array(chunk, dtype=np.float64)
        if actions.ndim != 2 or not len(actions):
            raise ValueError(f"the policy returned {actions.shape} actions, expected (K, D)")
        if not np.isfinite(actions).all():
            raise ValueError("the policy returned an action that is not finite")
        if query != self._open:  # of before a reset, or given up
            return Arrival(max(self.step - query.step, 0), now - query.time, 0)
        self._open = None
        delay = self.step - query.step
        actions = actions[delay:]
        if len(actions):
            self._accept(query.step, actions)
            self._observed = query.step
        return Arrival(delay, now - query.time, len(actions))

    def abandon(self, query: Query) -> None:
        """Give up `query`; its answer, should it still come, is dropped."""
        if query == self._open:
            self._open = None

    def next_action(self, now: float) -> np.ndarray | None:
        """Return the action (D,) to execute now and count it, or None if nothing is planned for this step."""
        self._tick(now)
        action = self._planned(self.step)
        if action is None:
            self.starved += 1
            return None
        self.step += 1
        return action.copy()

    def _tick(self, now: float) -> None:
        if not now >= self._now:
            raise ValueError(f"the clock went back from {self._now} to {now}")
        self._now = now

    @abstractmethod
    def _clear(self) -> None:
        """Forget the plan."""

    @abstractmethod
    def _due(self) -> bool:
        """Whether to ask although an action is planned."""

    @abstractmethod
    def _accept(self, observed: int, actions: np.ndarray) -> None:
        """Plan with `actions` (N, D), N > 0, for steps ``self.step, self.step + 1, ...``.

        `observed` is the step of their observation.
        """

    @abstractmethod
    def _planned(self, step: int) -> np.ndarray | None:
        """The action (D,) for `step`, not before ``self.step``, or None."""


class PlanScheduler(ChunkScheduler):
    """A scheduler whose plan is one array of actions, that asks every `horizon` executed actions."""

    @staticmethod
    def default_horizon(chunk_size: int) -> int:
        """Half a chunk: the other half is what can be executed while the policy thinks."""
        return max(1, chunk_size // 2)

    def _clear(self) -> None:
        self._first, self._plan = 0, np.empty((0, 0))

    def _due(self) -> bool:
        return self.step - self._observed >= self.horizon

    def _planned(self, step: int) -> np.ndarray | None:
        row = step - self._first
        return self._plan[row] if row < len(self._plan) else None

    def _ahead(self) -> np.ndarray:
        """What is left of the plan, from this step on."""
        return self._plan[self.step - self._first :]

"""The policy in a thread of its own: the control loop asks, goes on, and looks for the answer."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vla.runtime.chunk_scheduling import Query


class Policy(Protocol):
    """A policy, here or on a server."""

    def reset(self, seed: int) -> None:
        """Begin an episode."""

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, instruction: str) -> np.ndarray:
        """Return a chunk (K, D) in the contract's units."""


@dataclass(frozen=True)
class Observation:
    """What the policy is shown: images by camera key, (H, W, 3) uint8; state (S,) float32; the task."""

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    instruction: str


@dataclass(frozen=True)
class Answer:
    """A chunk (K, D), or what the policy raised instead, to `query`; `seconds` it took."""

    query: Query
    chunk: np.ndarray | None
    seconds: float
    error: Exception | None = None


class PolicyThread:
    """Asks `policy` one question at a time. The thread ends with the program, even if the policy hangs."""

    def __init__(self, policy: Policy):
        self._policy = policy
        self._questions: queue.SimpleQueue[tuple[Query, Observation] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)
        self._thread.start()

    def ask(self, query: Query, observation: Observation) -> None:
        """Hand over a question; does not wait."""
        self._questions.put((query, observation))

    def answer(self) -> Answer | None:
        """Return an answer that has come since the last call, or None. Never waits, never raises."""
        try:
            return self._answers.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        """End the thread after the question it is at; does not wait. Idempotent."""
        self._questions.put(None)

    def _run(self) -> None:
        while (question := self._questions.get()) is not None:
            query, seen = question
            begin = time.monotonic()
            chunk, error = None, None
            try:
                chunk = np.asarray(self._policy.act(seen.images, seen.state, seen.instruction), float)
            except Exception as raised:  # carried to the control loop, which raises it with the arm in hand
                error = raised
            self._answers.put(Answer(query, chunk, time.monotonic() - begin, error))

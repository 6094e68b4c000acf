"""One action per control step, from a policy that answers in chunks and takes a fixed number of steps to."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from vla.contract import OSC_POSE_DELTA
from vla.evaluation.plan import Plan
from vla.evaluation.policy_source import Policy, RoutedPolicy
from vla.evaluation.routing_trace import RoutingTrace
from vla.runtime.chunk_scheduling import SCHEDULERS, Query

GRIPPER = 6
"""Entry of an OSC_POSE action that is a command to keep, not a motion."""


class Actor:
    """Acts for one episode, as `plan` says: which scheduler, how many actions per query, which delay.

    Images are asked of the simulation only when the policy looks. With a delay of ``plan.policy_delay``
    control steps the world goes on while the policy thinks, as an arm's would: the answer to what was seen
    before step ``t`` is there before step ``t + policy_delay``, and until then the arm goes on with its plan,
    or stands still if it has none. `action_space` says what that means.

    `queries` counts the questions, `policy_s` the seconds they took, `trace` holds router statistics of the
    first one if asked for.
    """

    def __init__(
        self, policy: Policy, plan: Plan, trace: bool = False, action_space: str | None = OSC_POSE_DELTA
    ):
        self._policy, self._plan, self._wants_trace = policy, plan, trace
        self._scheduler = SCHEDULERS[plan.scheduler](plan.n_action_steps)
        self._answer: tuple[Query, np.ndarray, int] | None = None  # and the step at which it is there
        self._moves = action_space == OSC_POSE_DELTA  # else an action is a place to be
        self._last: np.ndarray | None = None
        self.queries, self.policy_s = 0, 0.0
        self.trace: RoutingTrace | None = None

    def action(self, simulation: Any, step: int) -> np.ndarray:
        """Return the action (D,) for control step `step`; that of OSC_POSE has entries in [-1, 1]."""
        if self._scheduler.wants_observation:
            query = self._scheduler.ask(step)
            self._answer = query, self._ask(simulation), step + self._plan.policy_delay
        if self._answer is not None and step >= self._answer[2]:
            query, chunk, _ = self._answer
            self._scheduler.receive(query, chunk, step)
            self._answer = None
        action = self._scheduler.next_action(step)
        if action is None:
            action = self._still(simulation)
        self._last = np.clip(action, -1.0, 1.0) if self._moves else np.asarray(action, float)
        return self._last

    def _still(self, simulation: Any) -> np.ndarray:
        """Return the action that changes nothing: no motion, or to stay at the last place."""
        if not self._moves:
            return simulation.state().astype(float) if self._last is None else self._last
        action = np.zeros(GRIPPER + 1)
        action[GRIPPER] = -1.0 if self._last is None else self._last[GRIPPER]  # open, as it settles
        return action

    def _ask(self, simulation: Any) -> np.ndarray:
        observation = simulation.images(), simulation.state(), simulation.language
        asked = time.perf_counter()
        if self._wants_trace and self.queries == 0 and isinstance(self._policy, RoutedPolicy):
            chunk, report = self._policy.act_with_report(*observation)
            self.trace = RoutingTrace.of(observation[0], report)
        else:
            chunk = self._policy.act(*observation)
        self.policy_s += time.perf_counter() - asked
        self.queries += 1
        chunk, needed = np.asarray(chunk), self._plan.n_action_steps
        if chunk.ndim != 2 or len(chunk) < needed:
            raise ValueError(f"the policy returned {chunk.shape} actions, {needed} are to be executed")
        return chunk

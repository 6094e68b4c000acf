"""Run one scripted demonstration, perturbed or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .grasp import GraspError
from .plan import fulfil
from .scene import Scene
from .style import DEFAULT, ActionNoise, Style

Record = Callable[[object, np.ndarray, np.ndarray], None]
"""``record(sim, clean_action, executed_action)``, called before each step."""


@dataclass(frozen=True)
class Demonstration:
    """Outcome of one demonstration; `actions` (steps, 7) are the executed ones, float64 in [-1, 1]."""

    success: bool
    steps: int
    actions: np.ndarray
    reason: str
    """Why it ended: "success", "step limit" or what could not be done."""


class Demonstrator:
    """Solves the task of a simulation that has just been reset, one action at a time.

    `seed` fixes every random choice. The simulation's privileged state is read before each action, so the
    caller may execute a perturbed action instead of the yielded one.
    """

    def __init__(self, sim, *, seed: int, style: Style = DEFAULT) -> None:
        self._rng = np.random.default_rng(seed)
        self._scene = Scene(sim)
        self._manner = style.draw(self._rng)

    def actions(self) -> Iterator[np.ndarray]:
        """Yield the next clean action (7,), float64 in [-1, 1], until the caller stops asking.

        Raises `GraspError` when an object cannot be held where it is.
        """
        yield from fulfil(self._scene, self._manner, self._rng)


def demonstrate(
    sim,
    episode,
    *,
    seed: int,
    style: Style = DEFAULT,
    record: Record | None = None,
    step_limit: int | None = None,
) -> Demonstration:
    """Reset `sim` to `episode` and demonstrate its task until the first success or the step limit.

    `seed` fixes manner and noise; the noise has its own stream, so that the same seed draws the same manner
    with and without it.
    """
    sim.reset(episode)
    limit = step_limit or sim.step_limit
    demonstrator = Demonstrator(sim, seed=seed, style=style)
    noise = ActionNoise(style, np.random.default_rng([seed, 1]))
    executed_actions: list[np.ndarray] = []
    reason = "step limit"
    try:
        for clean in demonstrator.actions():
            executed = noise(clean)
            if record is not None:
                record(sim, clean, executed)
            executed_actions.append(executed)
            if sim.step(executed):
                reason = "success"
                break
            if len(executed_actions) >= limit:
                break
    except GraspError as error:
        reason = str(error)
    actions = np.array(executed_actions).reshape(-1, 7)
    return Demonstration(reason == "success", len(actions), actions, reason)

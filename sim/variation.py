"""Varied tasks: the scenes of a suite with other targets in other places, for demonstrations only.

Where every scene of a suite asks for one thing, a policy learns from the scene what to do and never needs
the instruction: in libero_object each task has its own set of objects and its target always lies at the same
place. A varied reset draws the target among the scene's objects, exchanges where the objects lie, and says so
in the instruction. What LIBERO-PRO measures stays unseen: the target that its ``_task`` suite asks for in a
scene is never drawn in that scene, nor the layout of its ``_swap`` suite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla.errors import UserError
from vla.sim.suites import Suite, load_suite

Predicates = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Variation:
    """One drawn task: where things lie, what is asked for, and the sentence that asks for it."""

    initial_state: Predicates
    goal_state: Predicates
    language: str


@dataclass(frozen=True)
class VariedTask:
    """The variations of one task.

    `initial_state` and `goal_state` are the task's own predicates, `sentences` the instructions in use for
    it. `phrases` names every object that may be the target, the task's own `target` among them; all of them
    exchange places. `held_out_target` and `held_out_layout` are never drawn.
    """

    initial_state: Predicates
    goal_state: Predicates
    sentences: tuple[str, ...]
    target: str
    phrases: dict[str, str]
    held_out_target: str
    held_out_layout: Predicates

    @classmethod
    def of(cls, suite: Suite, index: int) -> VariedTask:
        """Read the variations of task `index` of a varied suite from its BDDL files.

        Raises `UserError` if the instruction does not call the target by its category's name.
        """
        task = suite.task(index)
        problem = _parse(task.bddl_path)
        own = load_suite(suite.base).task(index)
        sentences = (own.language, " ".join(problem["language_instruction"]).strip().lower())
        phrases = {
            instances[0]: category.replace("_", " ")
            for category, instances in problem["objects"].items()
            if len(instances) == 1
        }
        target = _target(problem, phrases)
        if any(phrases.get(target, "?") not in sentence for sentence in sentences):
            raise UserError(
                f"Task {index} of {suite.base} cannot be varied: '{own.language}' does not call its target by"
                " the name of its category."
            )
        used = {name for predicate in problem["goal_state"] for name in predicate} - {target}
        destinations = {name for name in phrases if any(part.startswith(name) for part in used)}
        return cls(
            _predicates(problem["initial_state"]),
            _predicates(problem["goal_state"]),
            sentences,
            target,
            {name: phrase for name, phrase in phrases.items() if name not in destinations},
            held_out_target=_target(_parse(_sibling(suite, "task", own.name)), phrases),
            held_out_layout=_predicates(_parse(_sibling(suite, "swap", own.name))["initial_state"]),
        )

    @property
    def targets(self) -> list[str]:
        """The objects that may be asked for."""
        return [name for name in self.phrases if name != self.held_out_target]

    def draw(self, seed: int) -> Variation:
        """Draw target, layout and wording; equal seeds give equal variations."""
        rng = np.random.default_rng(seed)
        target = self.targets[rng.integers(len(self.targets))]
        sentence = self.sentences[rng.integers(len(self.sentences))]
        layout = self._exchange(rng)
        while set(layout) == set(self.held_out_layout):
            layout = self._exchange(rng)
        goal = tuple(
            tuple(target if part == self.target else part for part in predicate)
            for predicate in self.goal_state
        )
        return Variation(layout, goal, sentence.replace(self.phrases[self.target], self.phrases[target]))

    def _exchange(self, rng: np.random.Generator) -> Predicates:
        """Return the initial state with the objects on each other's places."""
        free = [k for k, state in enumerate(self.initial_state) if state[1] in self.phrases]
        layout = list(self.initial_state)
        for place, other in zip(free, rng.permutation(free), strict=True):
            relation, _, region = self.initial_state[place]
            layout[place] = (relation, self.initial_state[other][1], region)
        return tuple(layout)


def _parse(bddl_path) -> dict:
    import libero.libero.envs.bddl_utils as bddl_utils

    return bddl_utils.robosuite_parse_problem(str(bddl_path))


def _predicates(parsed: Sequence[Sequence[str]]) -> Predicates:
    return tuple(tuple(predicate) for predicate in parsed)


def _target(problem: dict, phrases: dict[str, str]) -> str:
    """The object that the goal moves: first argument of its only predicate; "" if it is not that simple."""
    goal = problem["goal_state"]
    return goal[0][1] if len(goal) == 1 and goal[0][1] in phrases else ""


def _sibling(suite: Suite, change: str, name: str):
    tasks = load_suite(f"{suite.base}_{change}").tasks
    return next(task.bddl_path for task in tasks if task.name == name)

"""Banks and merges in an evaluation: a task router looks at the first observation and an expert acts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla.contract import CONTRACT_FILE, PolicyContract
from vla.errors import UserError, nearest
from vla.evaluation.plan import PlannedTask
from vla.json_file import load_json

if TYPE_CHECKING:
    from vla.experts.multi_expert import MultiExpertPolicy
    from vla.experts.task_routers.router import TaskRouter
    from vla.policy.checkpoint import LoadedPolicy

BANK_FILE, MERGE_FILE = "bank.json", "merge.json"  # named here too: their modules import torch


@dataclass(frozen=True)
class Routing:
    """How experts are chosen: `router` by name, with its `margin` (None: its own) and published form.

    It decides at an episode's first query, and again every `every` queries if that is not 0.
    """

    router: str = "oracle"
    margin: float | None = None
    parity: bool = False
    every: int = 0

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError(f"--reroute-every is {self.every}; it must be 0 (never) or more.")


@dataclass(frozen=True)
class ExpertsSource:
    """A bank's or a merge's folder with its routing, held to the content it had when it was opened.

    `truths` names the right expert of each (suite, task) where it is known, `place` is the folder as the user
    wrote it, `content` the hash of what is in it.
    """

    folder: Path
    routing: Routing
    truths: tuple[tuple[str, int, str], ...]
    place: str
    content: str

    @classmethod
    def open(
        cls, folder: Path, routing: Routing, truths: Mapping[tuple[str, int], str] | None = None
    ) -> ExpertsSource:
        """Open and verify the folder; raise `UserError` if it is neither bank nor merge, or has changed."""
        opened = _open(folder)
        opened.verify()
        return cls(folder.resolve(), routing, (), str(folder), opened.hash).told(truths or {})

    @property
    def label(self) -> str:
        """The folder and who chooses in it."""
        return f"{self.place} ({self.routing.router})"

    def told(self, truths: Mapping[tuple[str, int], str]) -> ExpertsSource:
        """The same with the right expert of each (suite, task)."""
        listed = tuple((suite, task, expert) for (suite, task), expert in sorted(truths.items()))
        return replace(self, truths=listed)

    def routed_by(self, routing: Routing) -> ExpertsSource:
        """The same with another router."""
        return replace(self, routing=routing)

    @property
    def hash(self) -> str:
        """SHA-256 over the experts' content, the routing and the truths: what decides an episode."""
        facts = [self.content, vars(self.routing), self.truths if self.routing.router == "oracle" else []]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def contract(self) -> PolicyContract:
        """The base's contract; experts differ in statistics only."""
        return PolicyContract.load(self.folder if _is_merge(self.folder) else _open(self.folder).base)

    @property
    def manifest(self) -> dict[str, Any]:
        """What the bank or the merge consists of."""
        return load_json(self.folder / (MERGE_FILE if _is_merge(self.folder) else BANK_FILE))

    def load(self) -> TaskRoutedPolicy:
        """Load base and experts; raise `UserError` if they changed since the evaluation began."""
        import torch

        from vla.experts.task_routers import make_task_router
        from vla.experts.task_routers.router import RouterSettings

        torch.set_num_threads(1)
        opened = _open(self.folder)
        if opened.hash != self.content:
            raise UserError(f"{self.folder} changed during the evaluation; start again with --overwrite.")
        policy = load_experts(self.folder)
        settings = RouterSettings(self.routing.margin, self.routing.parity, self.folder)
        router = make_task_router(self.routing.router, policy, settings)
        truths = {(suite, task): expert for suite, task, expert in self.truths}
        return TaskRoutedPolicy(policy, router, self.routing.every, truths)


@dataclass(frozen=True)
class NamedExpertSource:
    """One expert of a bank or a merge, by name, as a plain checkpoint: nobody chooses, no other is loaded."""

    folder: Path
    expert: str
    label: str
    hash: str

    @classmethod
    def open(cls, folder: Path, expert: str) -> NamedExpertSource:
        """Open and verify the folder; raise `UserError` as `ExpertsSource.open` does, or for another name."""
        source, names = ExpertsSource.open(folder, Routing()), _names(folder)
        if expert not in names:
            raise UserError(
                f"{folder} has no expert '{expert}'.{nearest(expert, names)} It has: {', '.join(names)}."
            )
        return cls(source.folder, expert, f"{source.place} ({expert})", source.content)

    @property
    def contract(self) -> PolicyContract:
        """The expert's contract, with its own statistics; the base's if it has none."""
        own = self.folder / "experts" / self.expert
        if (own / CONTRACT_FILE).is_file():
            return PolicyContract.load(own)
        return ExpertsSource(self.folder, Routing(), (), self.label, self.hash).contract

    def load_onto(self, device: str) -> LoadedPolicy:
        """Load the expert: of a bank on its base, of a merge with its masks and its own tensors."""
        from vla.experts.expert_policy import load_expert_policy
        from vla.experts.merged_policy import MergedPolicy

        if not _is_merge(self.folder):
            bank = _open(self.folder)
            return load_expert_policy(bank.base, bank.expert_folder(self.expert), device)
        policy = MergedPolicy.load(self.folder, device)
        policy.live.switch(policy.index(self.expert))
        return policy.faces[policy.index(self.expert)]


class TaskRoutedPolicy:
    """A policy of several experts and the router that chooses among them, as an evaluation's `Policy`.

    While the router abstains, the expert that acted before goes on; at the start its best guess acts.
    """

    def __init__(
        self,
        policy: MultiExpertPolicy,
        router: TaskRouter,
        every: int = 0,
        truths: Mapping[tuple[str, int], str] | None = None,
    ):
        self._policy, self._router, self._every, self._truths = policy, router, every, truths or {}
        self._truth: str | None = None
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Forget the episode and its expert; seed torch, for action decoders that sample."""
        import torch

        torch.manual_seed(seed)
        self._queries, self._expert = 0, None
        self._decisions: list[dict[str, Any]] = []

    def begin(self, suite: str, task: int) -> None:
        """Look up which expert is the right one."""
        self._truth = self._truths.get((suite, task))

    @property
    def route(self) -> dict[str, Any]:
        """``truth`` and the ``decisions``: at which query, the best guess, who acted, margin, abstention."""
        return {"truth": self._truth, "decisions": list(self._decisions)}

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, instruction: str) -> np.ndarray:
        """Choose an expert if it is time to, and let it answer."""
        from vla.experts.multi_expert import Observation

        seen = Observation(images, state, instruction)
        if self._expert is None or (self._every and self._queries % self._every == 0):
            self._choose(seen)
        self._queries += 1
        return self._policy.act([seen], [self._expert])[0]

    def _choose(self, seen: Any) -> None:
        decision = self._router.route(seen, self._truth)
        if self._expert is None or not decision.abstained:
            self._expert = decision.expert
        names = self._policy.names
        self._decisions.append(
            {
                "query": self._queries,
                "guess": names[decision.expert],
                "acted": names[self._expert],
                "margin": decision.margin,
                "abstained": decision.abstained,
            }
        )


def holds_experts(folder: Path) -> bool:
    """Whether `folder` is a bank or a merge."""
    return (Path(folder) / BANK_FILE).is_file() or _is_merge(folder)


def load_experts(folder: Path, device: str = "cpu") -> MultiExpertPolicy:
    """Load a bank or a merge onto a device."""
    from vla.experts.bank_policy import BankPolicy
    from vla.experts.merged_policy import MergedPolicy

    return MergedPolicy.load(folder, device) if _is_merge(folder) else BankPolicy.load(folder, device)


def known_instructions(folder: Path) -> dict[str, tuple[str, ...]]:
    """The instructions that each expert of a bank or merge was trained on."""
    from vla.experts.lora_expert import load_card

    cards = {name: load_card(Path(folder) / "experts" / name) for name in _names(folder)}
    return {name: card.instructions if card else () for name, card in cards.items()}


def right_experts(
    tasks: Iterable[PlannedTask], known: Mapping[str, Sequence[str]], named: Sequence[str] = ()
) -> dict[tuple[str, int], str]:
    """The right expert of every task: as `named` (``SUITE=EXPERT`` or ``SUITE:TASK=EXPERT``), else by card.

    A card counts if its expert is the only one that was trained on the task's instruction, word for word.
    Raises `UserError` for a task whose expert remains unknown and for a malformed or unknown name.
    """
    choices = dict(_named(entry, known) for entry in named)
    truths = {}
    for task in tasks:
        chosen = choices.get(f"{task.suite}:{task.task}", choices.get(task.suite))
        if chosen is None:
            holders = [name for name, texts in known.items() if task.language in texts]
            if len(holders) != 1:
                why = f"{' and '.join(holders)} were" if holders else "no expert's card says that it was"
                raise UserError(
                    f"Which expert is right for '{task.language}' ({task.suite} task {task.task})? {why}"
                    f" trained on it; say so with --task-experts {task.suite}:{task.task}=EXPERT."
                )
            chosen = holders[0]
        truths[task.suite, task.task] = chosen
    return truths


def _named(entry: str, known: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    place, equals, expert = entry.partition("=")
    if not equals or not place:
        raise UserError(f"--task-experts {entry} is malformed; write SUITE=EXPERT or SUITE:TASK=EXPERT.")
    if expert not in known:
        raise UserError(
            f"--task-experts {entry} names no expert.{nearest(expert, known)} There are: {', '.join(known)}."
        )
    return place, expert


def _names(folder: Path) -> tuple[str, ...]:
    opened = _open(folder)
    return opened.experts if _is_merge(folder) else opened.names


def _is_merge(folder: Path) -> bool:
    return (Path(folder) / MERGE_FILE).is_file()


def _open(folder: Path) -> Any:
    from vla.experts.bank_folder import BankFolder
    from vla.experts.merged import MergedCheckpoint

    return MergedCheckpoint.open(folder) if _is_merge(folder) else BankFolder.open(folder)

"""A bank or a merge that acts, on an arm or behind a server: who may choose among its experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla.contract import PolicyContract
from vla.errors import UserError

if TYPE_CHECKING:
    from vla.evaluation.policy_source import CheckpointSource, ExpertSource
    from vla.evaluation.task_routed import NamedExpertSource
    from vla.experts.chosen_expert import ChosenExpert
    from vla.experts.multi_expert import MultiExpertPolicy
    from vla.experts.task_routers.router import TaskRouter

PLAIN = "none"  # of --task-router: a merge acts as it is
BY_INSTRUCTION = "language"


@dataclass(frozen=True)
class ExpertChoice:
    """Who acts of a bank or a merge: the one that is named, or whom the router takes for the task.

    Raises `UserError` for both at once, and for a router that has to be told.
    """

    expert: str | None = None
    router: str | None = None
    margin: float | None = None

    def __post_init__(self):
        if self.expert is not None and (self.router is not None or self.margin is not None):
            raise UserError("Give either --expert or --task-router: one of them says who acts.")
        if self.router == "oracle":
            raise UserError("The router 'oracle' has to be told who acts: name the one with --expert.")

    def source(self, folder: Path) -> CheckpointSource | ExpertSource | NamedExpertSource | None:
        """What acts in `folder` if it is one policy; None where a router has to choose.

        Raises `UserError` for an expert that is not there, and if a choice was asked for in a folder that
        offers none.
        """
        from vla.evaluation.policy_source import open_source
        from vla.evaluation.task_routed import NamedExpertSource, holds_experts

        if self.router == PLAIN or not holds_experts(folder):
            self.refuse_for(str(folder))
            return open_source(folder)
        return None if self.expert is None else NamedExpertSource.open(folder, self.expert)

    def refuse_for(self, what: str) -> None:
        """Raise `UserError` if something was said that has no meaning for `what`, which is one policy."""
        if self.expert is not None or self.margin is not None or self.router not in (None, PLAIN):
            raise UserError(
                f"{what} is neither a bank nor a merge: leave out --expert, --task-router and"
                " --task-router-margin."
            )


@dataclass(frozen=True)
class Experts:
    """A loaded bank or merge and the router that chooses among its experts."""

    policy: MultiExpertPolicy
    router: TaskRouter
    contract: PolicyContract
    identity: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path, device: str, engine: str | None, choice: ExpertChoice) -> Experts:
        """Load and verify `folder`; `contract` is the base's, of which experts differ in statistics only.

        Raises `UserError` for a folder that has changed, an unknown router, and any `engine`.
        """
        from vla.evaluation.task_routed import ExpertsSource, Routing, load_experts
        from vla.experts.task_routers import make_task_router, require_router
        from vla.experts.task_routers.router import RouterSettings

        if engine is not None:
            raise UserError(
                "--engine runs one policy: name the expert that acts with --expert, or leave it out."
            )
        name = choice.router or BY_INSTRUCTION
        require_router(name)
        source = ExpertsSource.open(folder, Routing(name))
        policy = load_experts(folder, device)
        router = make_task_router(name, policy, RouterSettings(choice.margin, folder=folder))
        identity = {"checkpoint": {"label": source.place, "sha256": source.content}}
        return cls(policy, router, source.contract, identity)

    def chooser(self) -> ChosenExpert:
        """One episode's choice, still to be made."""
        from vla.experts.chosen_expert import ChosenExpert

        return ChosenExpert(self.policy, self.router)

"""Where the policy of a run lives: in this process or behind a server, alone or as one of several experts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla.contract import PolicyContract
from vla.errors import UserError
from vla.runtime.robot.policy_thread import Policy

if TYPE_CHECKING:
    from vla.runtime.robot.chosen_expert import ChosenExpert

TOKEN_VARIABLE = "VLA_TOKEN"
PLAIN = "none"  # of --task-router: a merge acts as it is
BY_INSTRUCTION = "language"


@dataclass(frozen=True)
class PolicyHere:
    """A policy that can be asked, with its contract. `identity` says which it is, for records.

    `expert` is `policy` itself where it is one of several experts, whose choice pre-flight shows.
    """

    policy: Policy
    contract: PolicyContract
    identity: Mapping[str, Any]
    expert: ChosenExpert | None = None

    def reset(self, seed: int) -> None:
        """Begin an episode."""
        self.policy.reset(seed)

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, instruction: str) -> np.ndarray:
        """Return a chunk (K, D) in the contract's units."""
        return self.policy.act(images, state, instruction)


@dataclass(frozen=True)
class ExpertChoice:
    """Who acts of a bank or a merge: the one that is named, or whom the router takes for the task.

    Raises `UserError` for both at once, and for a router that has to be told.
    """

    task: str
    expert: str | None = None
    router: str | None = None
    margin: float | None = None

    def __post_init__(self):
        if self.expert is not None and (self.router is not None or self.margin is not None):
            raise UserError("Give either --expert or --task-router: one of them says who acts.")
        if self.router == "oracle":
            raise UserError("The router 'oracle' has to be told who acts: name the one with --expert.")

    @property
    def asked(self) -> bool:
        """Whether something was said that has no meaning without several experts."""
        return self.expert is not None or self.margin is not None or self.router not in (None, PLAIN)


@contextmanager
def open_policy(
    checkpoint: Path | None,
    server: str | None,
    token: str | None,
    device: str | None,
    engine: str | None,
    choice: ExpertChoice,
) -> Iterator[PolicyHere]:
    """Load the checkpoint or connect to the server, whichever is given; leave it at the end.

    Raises `UserError` for none or both of them, for one that cannot be had, and for a bank or merge of which
    nobody knows who should act.
    """
    if (checkpoint is None) == (server is None):
        raise UserError("Say where the policy is: either --checkpoint DIR or --server ws://HOST:PORT.")
    if server is not None:
        _require_plain(choice, server)
        from vla.serving.client import RemotePolicy

        with RemotePolicy(server, token=token or os.environ.get(TOKEN_VARIABLE)) as remote:
            identity = {key: value for key, value in remote.metadata.items() if key != "contract"}
            yield PolicyHere(remote, remote.contract, identity | {"server": remote.url})
        return
    from vla.evaluation.task_routed import holds_experts

    if choice.router != PLAIN and holds_experts(checkpoint):
        yield _open_experts(checkpoint, device, engine, choice)
    else:
        _require_plain(choice, str(checkpoint))
        yield _open_checkpoint(checkpoint, device, engine)


def _require_plain(choice: ExpertChoice, what: str) -> None:
    if choice.asked:
        raise UserError(
            f"{what} is neither a bank nor a merge: leave out --expert, --task-router and"
            " --task-router-margin."
        )


def _open_checkpoint(checkpoint: Path, device: str | None, engine: str | None) -> PolicyHere:
    from vla.evaluation.policy_source import CheckpointPolicy, open_source
    from vla.serving.serve import load_answering

    source = open_source(checkpoint)
    return PolicyHere(
        CheckpointPolicy(load_answering(source, device, engine)),
        source.contract,
        {"checkpoint": {"label": source.label, "sha256": source.hash}},
    )


def _open_experts(folder: Path, device: str | None, engine: str | None, choice: ExpertChoice) -> PolicyHere:
    """Load a bank or a merge; whoever can be chosen without an observation is chosen here."""
    from vla.evaluation.task_routed import ExpertsSource, Routing, load_experts
    from vla.experts.multi_expert import Observation
    from vla.experts.task_routers import make_task_router, require_router
    from vla.experts.task_routers.router import RouterSettings
    from vla.runtime.robot.chosen_expert import ChosenExpert
    from vla.serving.serve import choose_device

    if engine is not None:
        raise UserError("--engine runs plain checkpoints, not banks or merges; leave it out.")
    router = choice.router or BY_INSTRUCTION
    require_router(router)
    source = ExpertsSource.open(folder, Routing(router))
    experts = load_experts(folder, choose_device(device))
    if choice.expert is not None:
        chosen = ChosenExpert(experts, expert=choice.expert)
    else:
        settings = RouterSettings(choice.margin, folder=folder)
        chosen = ChosenExpert(experts, make_task_router(router, experts, settings))
        if router == BY_INSTRUCTION:
            chosen.choose(Observation({}, np.zeros(0, np.float32), choice.task))
    identity = {"checkpoint": {"label": source.place, "sha256": source.content}}
    # The record keeps this dictionary itself, so a choice that is made in pre-flight is in it as well.
    return PolicyHere(chosen, chosen.contract, identity | {"choice": chosen.choice}, chosen)

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
from vla.serving.experts import BY_INSTRUCTION, ExpertChoice, Experts

if TYPE_CHECKING:
    from vla.evaluation.policy_source import CheckpointSource, ExpertSource
    from vla.evaluation.task_routed import NamedExpertSource
    from vla.experts.chosen_expert import ChosenExpert

TOKEN_VARIABLE = "VLA_TOKEN"


@dataclass(frozen=True)
class NamedExpert:
    """Who acts if the command line says so."""

    name: str

    @property
    def choice(self) -> dict[str, Any]:
        """For records; see `ChosenExpert.choice`."""
        return {"expert": self.name, "by": "--expert"}

    @property
    def sentence(self) -> str:
        """See `ChosenExpert.sentence`."""
        return f"'{self.name}' acts (--expert)"


@dataclass(frozen=True)
class PolicyHere:
    """A policy that can be asked, with its contract. `identity` says which it is, for records.

    `expert` says who acts where there are several experts, which pre-flight shows.
    """

    policy: Policy
    contract: PolicyContract
    identity: Mapping[str, Any]
    expert: ChosenExpert | NamedExpert | None = None

    def reset(self, seed: int) -> None:
        """Begin an episode."""
        self.policy.reset(seed)

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, instruction: str) -> np.ndarray:
        """Return a chunk (K, D) in the contract's units."""
        return self.policy.act(images, state, instruction)


@contextmanager
def open_policy(
    checkpoint: Path | None,
    server: str | None,
    token: str | None,
    device: str | None,
    engine: str | None,
    choice: ExpertChoice,
    task: str,
) -> Iterator[PolicyHere]:
    """Load the checkpoint or connect to the server, whichever is given; leave it at the end.

    Raises `UserError` for none or both of them, for one that cannot be had, and for a bank or merge of which
    nobody knows who should act.
    """
    if (checkpoint is None) == (server is None):
        raise UserError("Say where the policy is: either --checkpoint DIR or --server ws://HOST:PORT.")
    if server is not None:
        choice.refuse_for(server)
        from vla.serving.client import RemotePolicy

        with RemotePolicy(server, token=token or os.environ.get(TOKEN_VARIABLE)) as remote:
            identity = {key: value for key, value in remote.metadata.items() if key != "contract"}
            yield PolicyHere(remote, remote.contract, identity | {"server": remote.url})
        return
    source = choice.source(checkpoint)
    if source is None:
        yield _open_experts(checkpoint, device, engine, choice, task)
    else:
        yield _open_one(source, device, engine, choice.expert)


def _open_one(
    source: CheckpointSource | ExpertSource | NamedExpertSource,
    device: str | None,
    engine: str | None,
    expert: str | None,
) -> PolicyHere:
    from vla.evaluation.policy_source import CheckpointPolicy
    from vla.serving.serve import load_answering

    policy = CheckpointPolicy(load_answering(source, device, engine))
    identity: dict[str, Any] = {"checkpoint": {"label": source.label, "sha256": source.hash}}
    if expert is None:
        return PolicyHere(policy, source.contract, identity)
    named = NamedExpert(expert)
    return PolicyHere(policy, source.contract, identity | {"choice": named.choice}, named)


def _open_experts(
    folder: Path, device: str | None, engine: str | None, choice: ExpertChoice, task: str
) -> PolicyHere:
    """Load a bank or a merge; whoever can be chosen without an observation is chosen here."""
    from vla.experts.multi_expert import Observation
    from vla.experts.task_routers import TASK_ROUTERS
    from vla.serving.serve import choose_device

    experts = Experts.open(folder, choose_device(device), engine, choice)
    chosen = experts.chooser()
    if type(experts.router) is TASK_ROUTERS[BY_INSTRUCTION]:
        chosen.choose(Observation({}, np.zeros(0, np.float32), task))
    # The record keeps this dictionary itself, so a choice that is made in pre-flight is in it as well.
    return PolicyHere(chosen, chosen.contract, {**experts.identity, "choice": chosen.choice}, chosen)

"""Where the policy of a run lives: in this process, or behind a server."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla.contract import PolicyContract
from vla.errors import UserError
from vla.runtime.robot.policy_thread import Policy

TOKEN_VARIABLE = "VLA_TOKEN"


@dataclass(frozen=True)
class PolicyHere:
    """A policy that can be asked, with its contract. `identity` says which it is, for records."""

    policy: Policy
    contract: PolicyContract
    identity: Mapping[str, Any]

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
) -> Iterator[PolicyHere]:
    """Load the checkpoint or connect to the server, whichever is given; leave it at the end.

    Raises `UserError` for none or both of them, and for one that cannot be had.
    """
    if (checkpoint is None) == (server is None):
        raise UserError("Say where the policy is: either --checkpoint DIR or --server ws://HOST:PORT.")
    if server is not None:
        from vla.serving.client import RemotePolicy

        with RemotePolicy(server, token=token or os.environ.get(TOKEN_VARIABLE)) as remote:
            identity = {key: value for key, value in remote.metadata.items() if key != "contract"}
            yield PolicyHere(remote, remote.contract, identity | {"server": remote.url})
        return
    from vla.evaluation.policy_source import CheckpointPolicy, open_source
    from vla.serving.serve import load_answering

    source = open_source(checkpoint)
    loaded = load_answering(source, device, engine)
    yield PolicyHere(
        CheckpointPolicy(loaded),
        source.contract,
        {"checkpoint": {"label": source.label, "sha256": source.hash}},
    )

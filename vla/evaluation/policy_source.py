"""Where an evaluated policy comes from: the narrow waist between rollouts and whatever acts.

A rollout needs a `Policy`; a worker process makes its own from a `PolicySource`, which travels to it.
A checkpoint is one source; a policy server or a bank of experts is another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from vla.contract import CONTRACT_FILE, PolicyContract
from vla.errors import UserError
from vla.json_file import load_json
from vla.policy.routing_report import RoutingReport

if TYPE_CHECKING:
    from vla.policy.checkpoint import LoadedPolicy
    from vla.runtime.engine import PolicyEngine

SHIPPED_CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "nano"


class Policy(Protocol):
    """Something that answers an observation with a chunk of actions."""

    def reset(self, seed: int) -> None:
        """Forget the last episode; draw whatever is random from `seed`."""

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, instruction: str) -> np.ndarray:
        """Return actions (K, D) in the simulator's units.

        `images` maps a camera name to (H, W, 3) uint8, `state` is float32.
        """


@runtime_checkable
class RoutedPolicy(Policy, Protocol):
    """A policy that can say what its routers did."""

    def act_with_report(
        self, images: Mapping[str, np.ndarray], state: np.ndarray, instruction: str
    ) -> tuple[np.ndarray, RoutingReport]:
        """Like `act`, with the decisions of the routers."""


@runtime_checkable
class ExpertChooser(Policy, Protocol):
    """A policy of several experts that chooses among them, and says so afterwards."""

    def begin(self, suite: str, task: int) -> None:
        """Say which task the episode is about, for the records and for whoever may know the truth."""

    @property
    def route(self) -> dict[str, Any]:
        """What was chosen in this episode so far; JSON."""


class PolicySource(Protocol):
    """A picklable description from which every worker makes its own policy."""

    label: str
    hash: str

    @property
    def contract(self) -> PolicyContract:
        """What the policy expects and promises; cheap, read before any worker starts."""

    @property
    def manifest(self) -> dict[str, Any]:
        """How the policy came to be; shown in the report."""

    def load(self) -> Policy:
        """Make the policy, single-threaded: one worker is one core."""


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint folder, held to the content it had when the evaluation was planned."""

    path: Path
    label: str
    hash: str

    @classmethod
    def open(cls, path: Path) -> CheckpointSource:
        """Resolve and hash a checkpoint folder; raise `UserError` if it is none."""
        from vla.policy.checkpoint import checkpoint_hash, resolve_checkpoint

        if path == SHIPPED_CHECKPOINT and not path.exists():
            raise UserError("The package ships no trained checkpoint; name one with --checkpoint DIR.")
        resolved = resolve_checkpoint(path).resolve()  # `last` is a link that training moves on
        label = "nano (shipped)" if path == SHIPPED_CHECKPOINT else str(path)
        return cls(resolved, label, checkpoint_hash(resolved))

    @property
    def contract(self) -> PolicyContract:
        """The checkpoint's contract."""
        return PolicyContract.load(self.path)

    @property
    def manifest(self) -> dict[str, Any]:
        """The checkpoint's manifest."""
        return load_json(self.path / "manifest.json")

    def load(self) -> CheckpointPolicy:
        """Load the checkpoint; raise `UserError` if its content changed since the evaluation began."""
        import torch

        from vla.policy.checkpoint import checkpoint_hash

        torch.set_num_threads(1)
        if checkpoint_hash(self.path) != self.hash:
            raise UserError(
                f"The checkpoint {self.path} changed during the evaluation; start again with --overwrite."
            )
        return CheckpointPolicy(self.load_onto("cpu"))

    def load_onto(self, device: str) -> LoadedPolicy:
        """Load the checkpoint onto a device."""
        from vla.policy.checkpoint import load_checkpoint

        return load_checkpoint(self.path, device)


@dataclass(frozen=True)
class ExpertSource:
    """A lone expert on its base, both held to the content they had when the evaluation was planned."""

    path: Path
    base: Path
    label: str
    hash: str

    @classmethod
    def open(cls, path: Path) -> ExpertSource:
        """Find the base of the expert in the folder `path` and hash both; raise `UserError` if it is gone."""
        from vla.experts.expert_policy import find_base

        folder, base = path.resolve(), find_base(path)
        return cls(folder, base, str(path), _expert_hash(folder, base))

    @property
    def contract(self) -> PolicyContract:
        """The expert's contract, with its own statistics."""
        return PolicyContract.load(self.path)

    @property
    def manifest(self) -> dict[str, Any]:
        """The expert's manifest."""
        return load_json(self.path / "manifest.json")

    def load(self) -> CheckpointPolicy:
        """Load base and expert; raise `UserError` if one changed since the evaluation began."""
        import torch

        torch.set_num_threads(1)
        if _expert_hash(self.path, self.base) != self.hash:
            raise UserError(
                f"The expert {self.path} or its base changed during the evaluation; start again with"
                " --overwrite."
            )
        return CheckpointPolicy(self.load_onto("cpu"))

    def load_onto(self, device: str) -> LoadedPolicy:
        """Load base and expert onto a device."""
        from vla.experts.expert_policy import load_expert_policy

        return load_expert_policy(self.base, self.path, device)


def open_source(path: Path) -> CheckpointSource | ExpertSource:
    """Open whatever is in the folder `path`: an expert (a training run of one too) or a checkpoint."""
    from vla.experts.lora_expert import find_expert

    expert = find_expert(path)
    return CheckpointSource.open(path) if expert is None else ExpertSource.open(expert)


def _expert_hash(expert: Path, base: Path) -> str:
    """SHA-256 over the expert's tensors, settings and contract and the hash of its base."""
    from vla.experts.lora_expert import CONFIG_FILE, TENSORS_FILE
    from vla.policy.checkpoint import checkpoint_hash

    digest = hashlib.sha256(checkpoint_hash(base).encode())
    for name in (TENSORS_FILE, CONFIG_FILE, CONTRACT_FILE):
        if not (expert / name).is_file():
            raise UserError(f"The expert {expert} lacks {name}; copy it again.")
        digest.update((expert / name).read_bytes())
    return digest.hexdigest()


class CheckpointPolicy:
    """A loaded checkpoint, or the engine that answers for one, as a `Policy`."""

    def __init__(self, loaded: LoadedPolicy | PolicyEngine):
        self.loaded = loaded

    def reset(self, seed: int) -> None:
        """Seed torch, for action decoders that sample."""
        import torch

        torch.manual_seed(seed)

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, instruction: str) -> np.ndarray:
        """Ask the network once."""
        return self.loaded.act(images, state, instruction)

    def act_with_report(
        self, images: Mapping[str, np.ndarray], state: np.ndarray, instruction: str
    ) -> tuple[np.ndarray, RoutingReport]:
        """Ask the network once and keep what its routers did."""
        return self.loaded.act_with_report(images, state, instruction)

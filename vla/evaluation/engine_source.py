"""A checkpoint evaluated through the runtime engine, to see what faster arithmetic costs in success."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vla.contract import PolicyContract
from vla.errors import UserError
from vla.evaluation.policy_source import CheckpointPolicy, CheckpointSource, PolicySource


@dataclass(frozen=True)
class EngineSource:
    """`checkpoint` answered by `vla.runtime.engine.PolicyEngine` in `mode`."""

    checkpoint: CheckpointSource
    mode: str

    @classmethod
    def of(cls, source: PolicySource, mode: str) -> EngineSource:
        """Wrap a plain checkpoint; raise `UserError` for anything else and for an unknown mode.

        "auto" is no mode here: what it chooses depends on the machine, and an evaluation must not.
        """
        import torch

        from vla.runtime.engine import check_mode

        if not isinstance(source, CheckpointSource):
            raise UserError("--engine runs plain checkpoints, not experts, banks or merges; leave it out.")
        check_mode(mode, torch.device("cpu"))
        return cls(source, mode)

    @property
    def label(self) -> str:
        """The checkpoint's label and the mode."""
        return f"{self.checkpoint.label}, engine {self.mode}"

    @property
    def hash(self) -> str:
        """The checkpoint's hash: the plan says which mode answered."""
        return self.checkpoint.hash

    @property
    def contract(self) -> PolicyContract:
        """The checkpoint's contract."""
        return self.checkpoint.contract

    @property
    def manifest(self) -> dict[str, Any]:
        """The checkpoint's manifest."""
        return self.checkpoint.manifest

    def load(self) -> CheckpointPolicy:
        """Load the checkpoint as `CheckpointSource` does and put the engine in front of it."""
        from vla.runtime.engine import PolicyEngine

        return CheckpointPolicy(PolicyEngine(self.checkpoint.load().loaded, self.mode))

"""How often a router was right: confusion matrix, margins and abstention over many decisions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Verdict(NamedTuple):
    """One decision whose truth is known, by the experts' names."""

    truth: str
    expert: str
    margin: float | None
    abstained: bool


@dataclass(frozen=True)
class Confusion:
    """Counts over verdicts. `matrix[truth][expert]`: best guesses, abstentions included."""

    experts: tuple[str, ...]
    verdicts: tuple[Verdict, ...]

    @classmethod
    def of(cls, experts: Sequence[str], verdicts: Iterable[Verdict]) -> Confusion:
        """Count `verdicts` among `experts`."""
        return cls(tuple(experts), tuple(verdicts))

    @property
    def matrix(self) -> list[list[int]]:
        """Rows are the truth, columns the expert that acted, both in the order of `experts`."""
        return [
            [sum((v.truth, v.expert) == (truth, expert) for v in self.verdicts) for expert in self.experts]
            for truth in self.experts
        ]

    @property
    def accuracy(self) -> float | None:
        """Share of decisions whose best guess was right; None without any."""
        return _share([v.truth == v.expert for v in self.verdicts])

    @property
    def accuracy_when_sure(self) -> float | None:
        """The same among the decisions that were not abstained from."""
        return _share([v.truth == v.expert for v in self.verdicts if not v.abstained])

    @property
    def abstained(self) -> float | None:
        """Share of decisions that were abstained from."""
        return _share([v.abstained for v in self.verdicts])

    def as_dict(self) -> dict[str, Any]:
        """What a report holds; margins are means over the right and over the wrong decisions."""
        margins = {
            kind: _mean(
                [v.margin for v in self.verdicts if v.margin is not None and (v.truth == v.expert) is right]
            )
            for kind, right in (("right", True), ("wrong", False))
        }
        return {
            "experts": list(self.experts),
            "confusion": self.matrix,
            "decisions": len(self.verdicts),
            "accuracy": self.accuracy,
            "accuracy_when_sure": self.accuracy_when_sure,
            "abstained": self.abstained,
            "margin": margins,
        }


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None

"""No pruning: every layer computes on every vision token."""

from __future__ import annotations

from vla.policy.pruners.pruner import Budget, Pruner


class KeepAll(Pruner):
    """The dense model. `select` is never asked."""

    def __init__(self, hidden_size: int, budget: Budget):
        super().__init__()
        self.counts = (budget.tokens,) * len(budget.counts)

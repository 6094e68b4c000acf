"""An episode is fixed before it runs: suite, task, initial state and seed.

The seed decides everything that the recorded initial state does not contain: the poses of
fixtures (cabinet, stove, rack, microwave), and for random resets the poses of all objects.
Three disjoint ranges of seeds keep benchmark, demonstrations and held-out resets apart.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

BENCHMARK_SEEDS = range(0, 2**20)
DEMONSTRATION_SEEDS = range(2**20, 2**31)
HELD_OUT_SEEDS = range(2**31, 2**32)


@dataclass(frozen=True, order=True)
class Episode:
    """One episode. `init_state` is an index into the suite's recorded states, None a random reset."""

    suite: str
    task: int
    init_state: int | None
    seed: int


def benchmark_episode(suite: str, task: int, init_state: int) -> Episode:
    """Return the benchmark's episode for a recorded initial state; its seed depends on nothing else."""
    return Episode(suite, task, init_state, _seed(BENCHMARK_SEEDS, suite, task, init_state))


def demonstration_seed(seed: int, suite: str, task: int, index: int) -> int:
    """Seed of the `index`-th random reset when demonstrating with the run's `seed`."""
    return _seed(DEMONSTRATION_SEEDS, seed, suite, task, index)


def held_out_seed(seed: int, suite: str, task: int, index: int) -> int:
    """Like `demonstration_seed`, from a range that demonstrations never use."""
    return _seed(HELD_OUT_SEEDS, seed, suite, task, index)


def _seed(allowed: range, *parts: str | int) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return allowed.start + int.from_bytes(digest[:8], "big") % len(allowed)

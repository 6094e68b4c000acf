"""From chunks of actions to one action per control period, while the policy is still thinking.

A policy answers an observation with a chunk (K, D): row ``i`` is meant for the ``i``-th action *executed*
after the observation. The arm does not wait for the answer. A scheduler decides when the policy is asked,
and which action comes next. It needs numpy alone, starts no thread, reads no clock and draws no random
number: what it emits is a function of the calls below, in their order. One thread calls everything.

    scheduler = make_scheduler("real_time", chunk_size=contract.chunk_size)
    scheduler.reset()                                      # an episode starts
    every control period, at `now` (s, any clock that never goes back):
        if answer is ready:
            scheduler.receive(query, chunk, now)           # -> Arrival: the latency that was measured
        if scheduler.wants_observation:                    # never while a query is under way
            query = scheduler.ask(now)                     # then observe, and hand both to the policy
        action = scheduler.next_action(now)                # (D,) float64; None: nothing planned, hold still

Who runs the policy in the same thread calls `ask`, the policy, `receive` and `next_action` one after the
other. `abandon(query)` gives up a query that will not be answered (the policy failed, the server is gone).

**Time is counted in executed actions** (`scheduler.step`), not in seconds. When an answer arrives, the
actions that went out since its observation have been counted, so that nothing is estimated: an estimate that
is wrong makes the arm jump. A period in which `next_action` gives None moves nothing and does not count.

Schedulers by name (`SCHEDULERS`); `horizon` says how many actions are executed before the policy is asked
again:

    execute_all           stop, look, execute `horizon` actions; what LIBERO's protocol does
    receding_horizon      ask every `horizon` actions, go on meanwhile, switch to the new chunk when it comes
    temporal_ensembling   ask every `horizon` actions, average all chunks that say something about this step
    real_time             like receding_horizon, and blend the old plan into the new over their overlap
"""

from __future__ import annotations

from vla.errors import UserError, nearest
from vla.runtime.chunk_scheduling.execute_all import ExecuteAll
from vla.runtime.chunk_scheduling.real_time import RealTime
from vla.runtime.chunk_scheduling.receding_horizon import RecedingHorizon
from vla.runtime.chunk_scheduling.scheduler import Arrival, ChunkScheduler, Query
from vla.runtime.chunk_scheduling.temporal_ensembling import TemporalEnsembling

__all__ = [
    "SCHEDULERS",
    "Arrival",
    "ChunkScheduler",
    "Query",
    "default_horizon",
    "make_scheduler",
]

SCHEDULERS: dict[str, type[ChunkScheduler]] = {
    "execute_all": ExecuteAll,
    "receding_horizon": RecedingHorizon,
    "temporal_ensembling": TemporalEnsembling,
    "real_time": RealTime,
}
"""Schedulers by the name that a command line uses."""


def make_scheduler(name: str, chunk_size: int, horizon: int | None = None) -> ChunkScheduler:
    """Make the scheduler `name` for a policy that predicts `chunk_size` actions.

    Without `horizon` it is `default_horizon`. Raises `UserError` for an unknown name, and for a horizon
    that does not lie between 1 and `chunk_size`.
    """
    horizon = default_horizon(name, chunk_size) if horizon is None else horizon
    if not 1 <= horizon <= chunk_size:
        raise UserError(
            f"The scheduler {name} cannot execute {horizon} actions per query: the policy predicts"
            f" {chunk_size}; choose a number from 1 to {chunk_size}."
        )
    return SCHEDULERS[name](horizon)


def default_horizon(name: str, chunk_size: int) -> int:
    """Return how many actions the scheduler `name` executes per query of `chunk_size`, unless told otherwise.

    Raises `UserError` for an unknown name.
    """
    if name not in SCHEDULERS:
        raise UserError(
            f"There is no chunk scheduler '{name}'.{nearest(name, SCHEDULERS)}"
            f" Known: {', '.join(SCHEDULERS)}."
        )
    return SCHEDULERS[name].default_horizon(chunk_size)

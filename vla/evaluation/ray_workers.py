"""The same worker function as Ray tasks, on a cluster or a local Ray (extra ``distributed``).

Every node needs this package and, for a checkpoint, a file system on which its path exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vla.errors import UserError
from vla.evaluation.rollout import Outcome, Request, RolloutJob, run_episodes
from vla.evaluation.schedule import EpisodeQueue
from vla.evaluation.workers import Failure

#: Episodes per Ray task: enough to spread the start-up of policy and simulation, few enough to balance.
BLOCK = 10


class RayWorkers:
    """Up to `count` Ray tasks at a time; `address` as in ``ray.init`` ("local" starts a Ray here).

    An episode that takes longer than `timeout` seconds, start-up and queueing included, loses its task.
    """

    def __init__(self, job: RolloutJob, count: int, timeout: float, address: str):
        try:
            import ray
        except ImportError:
            raise UserError(
                "--ray needs Ray: pip install 'lerobot_policy_cogmerge[distributed]', or leave --ray out."
            ) from None
        self._ray, self._job, self._count, self._timeout, self._address = ray, job, count, timeout, address

    def run(self, queue: EpisodeQueue) -> Iterator[Outcome | Failure]:
        """See `vla.evaluation.workers.Backend.run`."""
        self._connect()
        running: dict[Any, list[Request]] = {}  # a task's stream of outcomes: what it still owes
        task = self._ray.remote(num_cpus=1, max_retries=0, max_calls=1)(run_episodes)
        job = self._ray.put(self._job)
        try:
            while len(queue) or running:
                while len(queue) and len(running) < self._count:
                    block = queue.take_block(BLOCK)
                    running[task.remote(job, block)] = block
                ready, _ = self._ray.wait(list(running), num_returns=1, timeout=self._timeout)
                for stream in ready or list(running)[:1]:
                    yield from self._advance(stream, running, queue, late=not ready)
        finally:
            for stream in running:
                self._ray.cancel(stream, force=True)
            self._ray.shutdown()

    def _connect(self) -> None:
        try:
            if self._address == "local":
                self._ray.init(
                    address="local", num_cpus=self._count, include_dashboard=False, log_to_driver=False
                )
            else:
                self._ray.init(address=self._address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"No Ray cluster answers at '{self._address}' ({error}).") from None

    def _advance(
        self, stream: Any, running: dict[Any, list[Request]], queue: EpisodeQueue, *, late: bool
    ) -> Iterator[Outcome | Failure]:
        """Take the next outcome of a task; on its end forget it, on its death hand back what it owes."""
        owed = running[stream]
        try:
            if late:
                raise TimeoutError(f"no result within {self._timeout:g} s, the task was stopped")
            outcome = self._ray.get(next(stream))
        except StopIteration:
            del running[stream]
        except (self._ray.exceptions.RayError, TimeoutError) as error:
            del running[stream]
            self._ray.cancel(stream, force=True)
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from None
            for request in owed[1:]:
                queue.put_back(request)
            if owed:
                yield Failure(owed[0], f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}")
        else:
            owed.remove(outcome.request)
            yield outcome

"""Worker processes on this machine, and the supervision that every back-end shares.

multiprocessing's own pools hang or give up when a worker is killed. Here each worker has a pipe; a
death closes it, which names the episode that was running.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Protocol

from vla.errors import UserError
from vla.evaluation.records import ERROR, EpisodeRecord
from vla.evaluation.rollout import Outcome, Request, RolloutJob, run_episodes, versions
from vla.evaluation.schedule import EpisodeQueue, Scene, scene_of

ATTEMPTS = 2  # every episode that ends in an error is tried once more
#: So many errors before the first result mean that nothing works, not that something broke.
_HOPELESS = 4
#: A worker that has grown beyond this is replaced at its next change of task.
_RECYCLE_MB = 1900
#: One core per worker, and one malloc arena per thread would keep freed memory.
_WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}


@dataclass(frozen=True)
class Failure:
    """An episode that could not be carried through; `error` is one line."""

    request: Request
    error: str


@dataclass(frozen=True)
class Refusal:
    """A worker's `UserError`: the run as a whole cannot work."""

    sentence: str


class Backend(Protocol):
    """Runs requests somewhere."""

    def run(self, queue: EpisodeQueue) -> Iterator[Outcome | Failure]:
        """Yield one event per handed-out request until `queue` is empty; it may be refilled meanwhile."""


def supervise(backend: Backend, queue: EpisodeQueue, checkpoint_hash: str) -> Iterator[Outcome]:
    """Run everything in `queue`; yield exactly one outcome per request.

    An episode that ended in an error is retried once; if that fails too its record says "error". Raises
    `UserError` when errors come before any result.
    """
    errors: dict[Request, list[str]] = {}
    finished = Counter()
    for event in backend.run(queue):
        request = event.request
        if isinstance(event, Failure):
            finished["failures"] += 1
            errors.setdefault(request, []).append(event.error)
            if not finished["outcomes"] and finished["failures"] >= _HOPELESS:
                raise UserError(f"No episode can be run on this machine: {event.error.rstrip('.')}.")
            if len(errors[request]) < ATTEMPTS:
                queue.put_back(request)
                continue
            record = _error_record(request, checkpoint_hash)
            event = Outcome(request, record)
        else:
            finished["outcomes"] += 1
        said = tuple(errors.get(request, ()))
        attempts = len(said) + (event.record.status != ERROR)
        yield replace(event, record=replace(event.record, attempts=attempts, errors=said))


def _error_record(request: Request, checkpoint_hash: str) -> EpisodeRecord:
    episode = request.episode
    return EpisodeRecord(
        suite=episode.suite,
        task=episode.task,
        init_state=episode.init_state,
        seed=episode.seed,
        status=ERROR,
        success=None,
        steps=0,
        queries=0,
        wall_s=0.0,
        policy_s=0.0,
        worker_rss_mb=0,
        checkpoint_hash=checkpoint_hash,
        versions=versions(),
    )


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: connection.Connection
    scene: Scene | None = None
    request: Request | None = None
    deadline: float = 0.0
    oversized: bool = False


class LocalWorkers:
    """`count` processes on this machine, one simulation and one core each.

    An episode that takes longer than `timeout` seconds, start-up included, is stopped.
    """

    def __init__(self, job: RolloutJob, count: int, timeout: float):
        self._job, self._count, self._timeout = job, count, timeout
        self._workers: list[_Worker] = []

    def run(self, queue: EpisodeQueue) -> Iterator[Outcome | Failure]:
        """See `Backend.run`. However this ends, no worker is left behind."""
        try:
            while len(queue) or any(worker.request for worker in self._workers):
                self._hand_out(queue)
                yield from self._collect()
        finally:
            for worker in list(self._workers):
                self._discard(worker)

    def _hand_out(self, queue: EpisodeQueue) -> None:
        for worker in [worker for worker in self._workers if worker.request is None]:
            request = queue.take(worker.scene)
            if request is None:
                return
            if worker.oversized and scene_of(request) != worker.scene:
                self._discard(worker)
                worker = self._start()
            self._give(worker, request)
        while len(self._workers) < self._count and (request := queue.take()) is not None:
            self._give(self._start(), request)

    def _give(self, worker: _Worker, request: Request) -> None:
        worker.request, worker.scene = request, scene_of(request)
        worker.deadline = time.monotonic() + self._timeout
        with contextlib.suppress(BrokenPipeError):  # it died idle: the next `_collect` sees that
            worker.pipe.send(request)

    def _collect(self) -> Iterator[Outcome | Failure]:
        """Wait for the next event of any busy worker and yield what happened."""
        busy = {worker.pipe: worker for worker in self._workers if worker.request}
        patience = max(0.0, min(worker.deadline for worker in busy.values()) - time.monotonic())
        for pipe in connection.wait(list(busy), timeout=patience):
            yield self._read(busy[pipe])
        for worker in [worker for worker in self._workers if worker.request]:
            if time.monotonic() >= worker.deadline:
                yield self._lose(worker, f"no result within {self._timeout:g} s, the worker was stopped")

    def _read(self, worker: _Worker) -> Outcome | Failure:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of a message
            worker.process.join(timeout=5)
            return self._lose(worker, f"the worker process died ({_cause(worker.process.exitcode)})")
        if isinstance(message, Refusal):
            raise UserError(message.sentence)
        if isinstance(message, Failure):
            return self._lose(worker, message.error)
        worker.request = None
        worker.oversized = message.record.worker_rss_mb > _RECYCLE_MB
        return message

    def _lose(self, worker: _Worker, error: str) -> Failure:
        failure = Failure(worker.request, error)
        self._discard(worker)
        return failure

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")  # a forked OpenGL or torch state is undefined
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, self._job), daemon=True)
        with _interrupts_ignored(), _environment(_WORKER_ENVIRONMENT):
            process.start()
        theirs.close()  # so that the worker's death is the end of the pipe
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker

    def _discard(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.process.kill()  # it holds nothing that is worth a clean end
        worker.process.join()
        worker.pipe.close()


def serve(pipe: connection.Connection, job: RolloutJob) -> None:
    """The worker process: answer every request that arrives with its outcome."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with _LastWords(pipe) as words:
        for outcome in run_episodes(job, words.remember(iter(pipe.recv, None))):
            pipe.send(outcome)


class _LastWords:
    """Tells the supervisor why this process ends, then lets it end."""

    def __init__(self, pipe: connection.Connection):
        self._pipe = pipe
        self._request: Request | None = None

    def remember(self, requests: Iterator[Request]) -> Iterator[Request]:
        for self._request in requests:
            yield self._request

    def __enter__(self) -> _LastWords:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, UserError):
            self._pipe.send(Refusal(str(error)))
        elif isinstance(error, Exception) and not isinstance(error, EOFError):  # nobody listens any more
            place = traceback.extract_tb(trace)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            self._pipe.send(Failure(self._request, f"{kind.__name__}: {error} ({where})"))
        return isinstance(error, Exception)  # the supervisor reports it


def _die_with_parent() -> None:
    """End this process when its parent is gone, also when that was killed in the middle of an episode."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _cause(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"exit code {exit_code}"
    return f"signal {-exit_code}, {signal.strsignal(-exit_code)}"


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Let children inherit "ignore SIGINT": Ctrl-C reaches the whole group, but only we shall act on it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

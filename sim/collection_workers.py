"""The processes that record demonstrations, and the rule that hands out their attempts.

One process holds one simulation of one task and ends when its task needs no further attempt: making
the simulation costs a few seconds, so a process stays with its task, and its memory goes with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from vla.errors import UserError
from vla.sim.demonstrators.style import Style
from vla.sim.episode import Episode, demonstration_seed
from vla.sim.recording import VideoSettings, record_attempt
from vla.sim.worlds import world_of

#: A worker reports one of these: an attempt's outcome, a sentence for the user, or an OSError's arguments.
Report = tuple[str, bool | str | tuple]


class AttemptSchedule:
    """Which attempts at one task to make until `wanted` have succeeded.

    Attempt `k` is made only if fewer than `wanted` of the attempts before it have succeeded or are
    under way. Whatever the order in which attempts finish, the attempts made are then exactly those
    that one worker alone would make, and no success is surplus.
    """

    def __init__(self, wanted: int, limit: int, outcomes: Mapping[int, bool]):
        self.wanted, self.limit = wanted, limit
        self.outcomes = dict(outcomes)
        self.running: set[int] = set()

    def next(self) -> int | None:
        """Return the next attempt to make and count it as under way; None if there is none to make now."""
        taken = self.outcomes.keys() | self.running
        attempt = next(k for k in range(len(taken) + 1) if k not in taken)
        promising = sum(self.outcomes.get(k, True) for k in range(attempt))
        if promising >= self.wanted or attempt >= self.limit:
            return None
        self.running.add(attempt)
        return attempt

    def finish(self, attempt: int, success: bool) -> None:
        """Record the outcome of an attempt."""
        self.running.discard(attempt)
        self.outcomes[attempt] = success

    def abandon(self, attempt: int) -> None:
        """Give an attempt back that its worker could not finish."""
        self.running.discard(attempt)

    @property
    def kept(self) -> list[int]:
        """The first `wanted` successes, in order."""
        return [k for k in sorted(self.outcomes) if self.outcomes[k]][: self.wanted]


@dataclass(frozen=True)
class WorkOrder:
    """What a worker needs to know besides its task: everything that decides a demonstration."""

    suite: str
    seed: int
    style: Style
    image_size: int
    video: VideoSettings
    folder: Path

    def attempt_folder(self, task: int, attempt: int) -> Path:
        """Folder of one attempt."""
        return self.folder / f"task_{task:02d}" / f"attempt_{attempt:05d}"


@dataclass
class _Worker:
    task: int
    attempt: int
    process: BaseProcess
    connection: Connection

    def assign(self, attempt: int) -> None:
        self.attempt = attempt
        self.connection.send(attempt)


class WorkerPool:
    """Runs attempts in up to `size` processes until every schedule is satisfied or exhausted.

    `finished` is called with (task, attempt, success) after every attempt.
    """

    def __init__(self, order: WorkOrder, size: int, finished: Callable[[int, int, bool], None]):
        self._order, self._size, self._finished = order, size, finished
        self._context = multiprocessing.get_context("spawn")  # a forked OpenGL or MuJoCo state is broken
        self._workers: list[_Worker] = []
        self._deaths: Counter[tuple[int, int]] = Counter()

    def run(self, schedules: Mapping[int, AttemptSchedule]) -> None:
        """Make all attempts; raise `UserError` when a worker reports one or dies twice on an attempt."""
        try:
            self._hire(schedules)
            while self._workers:
                ready = wait([worker.connection for worker in self._workers])
                for worker in [w for w in self._workers if w.connection in ready]:
                    self._receive(worker, schedules[worker.task])
                self._hire(schedules)
        finally:
            for worker in self._workers:
                worker.process.kill()
            for worker in self._workers:
                worker.process.join()
            self._workers.clear()

    def _hire(self, schedules: Mapping[int, AttemptSchedule]) -> None:
        """Fill free places: first the tasks that fewest workers are busy with."""
        while len(self._workers) < self._size:
            busy = Counter(worker.task for worker in self._workers)
            for task in sorted(schedules, key=lambda task: (busy[task], task)):
                attempt = schedules[task].next()
                if attempt is not None:
                    self._start(task, attempt)
                    break
            else:
                return

    def _start(self, task: int, attempt: int) -> None:
        connection, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(self._order, task, theirs), daemon=True)
        with _environment(OMP_NUM_THREADS="1", SVT_LOG="1", PYTHONWARNINGS="ignore::SyntaxWarning"):
            process.start()
        theirs.close()
        worker = _Worker(task, attempt, process, connection)
        self._workers.append(worker)
        worker.assign(attempt)

    def _receive(self, worker: _Worker, schedule: AttemptSchedule) -> None:
        try:
            kind, content = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            self._bury(worker, schedule)
            return
        if kind == "user error":
            raise UserError(content)
        if kind == "os error":
            raise OSError(*content)
        schedule.finish(worker.attempt, content)
        self._finished(worker.task, worker.attempt, content)
        attempt = schedule.next()
        if attempt is None:
            self._dismiss(worker)
        else:
            worker.assign(attempt)

    def _dismiss(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.connection.close()
        worker.process.join()

    def _bury(self, worker: _Worker, schedule: AttemptSchedule) -> None:
        """Give the attempt of a dead worker one more try."""
        self._dismiss(worker)
        schedule.abandon(worker.attempt)
        key = (worker.task, worker.attempt)
        self._deaths[key] += 1
        if self._deaths[key] > 1:
            code = worker.process.exitcode
            why = (
                "killed, usually for lack of memory: try fewer --workers"
                if code == -9
                else f"exit code {code}"
            )
            raise UserError(
                f"Two workers died on task {worker.task}, attempt {worker.attempt} ({why}); "
                "what is recorded is kept, go on with --resume."
            )


def _work(order: WorkOrder, task: int, connection: Connection) -> None:
    """A worker's life: record the attempts that come in until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        with world_of(order.suite).simulate(order.suite, task, image_size=order.image_size) as sim:
            for attempt in iter(lambda: _receive_attempt(connection), None):
                episode = Episode(order.suite, task, None, _seed(order, task, attempt))
                folder = order.attempt_folder(task, attempt)
                connection.send(("done", record_attempt(sim, episode, order.style, folder, order.video)))
    except UserError as error:
        connection.send(("user error", str(error)))
    except OSError as error:
        connection.send(("os error", (error.errno, error.strerror, error.filename)))


def _receive_attempt(connection: Connection) -> int | None:
    try:
        return connection.recv()
    except EOFError:
        return None


def _seed(order: WorkOrder, task: int, attempt: int) -> int:
    return demonstration_seed(order.seed, order.suite, task, attempt)


def _follow_parent() -> None:
    """End this process when its parent is gone, even if the parent was killed."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables for the processes started inside."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)

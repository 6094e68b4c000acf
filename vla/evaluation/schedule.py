"""Who runs what: episodes handed out task by task, since a change of task costs a new simulation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from vla.evaluation.rollout import Request

Scene = tuple[str, int]


class EpisodeQueue:
    """Pending requests, in one lane per task.

    A worker stays in its lane while there is work, then opens an untouched one, and when none is left
    helps in the longest: late in a run all workers share the remaining tasks.
    """

    def __init__(self, requests: Iterable[Request]):
        self._lanes: dict[Scene, deque[Request]] = {}
        self._opened: set[Scene] = set()
        for request in requests:
            self._lanes.setdefault(scene_of(request), deque()).append(request)

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def take(self, scene: Scene | None = None) -> Request | None:
        """Hand out one request to a worker whose simulation shows `scene`; None when nothing is left."""
        lane = self._choose(scene)
        if lane is None:
            return None
        self._opened.add(lane)
        return self._lanes[lane].popleft()

    def take_block(self, size: int) -> list[Request]:
        """Hand out up to `size` requests of one task."""
        first = self.take()
        block = [] if first is None else [first]
        while block and len(block) < size and self._lanes[scene_of(block[0])]:
            block.append(self._lanes[scene_of(block[0])].popleft())
        return block

    def put_back(self, request: Request) -> None:
        """Return a request, to be handed out next in its lane."""
        self._lanes[scene_of(request)].appendleft(request)

    def _choose(self, scene: Scene | None) -> Scene | None:
        if scene is not None and self._lanes.get(scene):
            return scene
        waiting = [lane for lane, requests in self._lanes.items() if requests]
        fresh = [lane for lane in waiting if lane not in self._opened]
        return max(fresh or waiting, key=lambda lane: len(self._lanes[lane]), default=None)


def scene_of(request: Request) -> Scene:
    """The suite and task of a request: what a simulation is made for."""
    return request.episode.suite, request.episode.task

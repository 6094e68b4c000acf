"""Ctrl-C and SIGTERM wait for the step boundary, where a checkpoint can be written."""

from __future__ import annotations

import signal
from contextlib import AbstractContextManager
from types import FrameType


class Interruption(AbstractContextManager):
    """While active, the first SIGINT or SIGTERM sets `requested`; the second raises KeyboardInterrupt."""

    def __init__(self):
        self.requested = False
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

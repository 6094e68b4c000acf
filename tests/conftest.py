"""Fixtures shared by all rooms: one simulation at a time, reused as long as the scene stays the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest

# The same examples every time, whoever runs them; and no example is wrong because the computer was busy.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A background job starts with SIGINT ignored, and so would every program that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


class SimulationFactory:
    """Hands out the process's only simulation: ``simulation_factory("libero_object", 0)``.

    Building a scene takes seconds, so the last one is kept and handed out again when the same one is
    asked for; order tests by scene. Call `close` before code that builds a simulation itself.
    """

    def __init__(self):
        self._key, self._simulation = None, None

    def __call__(self, suite: str = "libero_object", task: int = 0, **options):
        from vla.sim import LiberoSimulation

        key = (suite, task, tuple(sorted(options.items())))
        if key != self._key or self._simulation.env is None:
            self.close()
            self._simulation = LiberoSimulation(suite, task, **options)
            self._key = key
        return self._simulation

    def close(self) -> None:
        if self._simulation is not None:
            self._simulation.close()
        self._key, self._simulation = None, None


@pytest.fixture(scope="session")
def _simulation_factory() -> Iterator[SimulationFactory]:
    factory = SimulationFactory()
    yield factory
    factory.close()


@pytest.fixture
def simulation_factory(_simulation_factory) -> SimulationFactory:
    return _simulation_factory

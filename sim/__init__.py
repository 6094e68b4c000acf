"""LIBERO simulation: suites, deterministic episodes, on-demand rendering, demonstrators, collection."""

from vla.sim.episode import Episode, benchmark_episode, demonstration_seed, held_out_seed
from vla.sim.simulation import LiberoSimulation, SimulationError, sim_interface
from vla.sim.suites import Suite, Task, load_suite, suite_names

__all__ = [
    "Episode",
    "LiberoSimulation",
    "SimulationError",
    "Suite",
    "Task",
    "benchmark_episode",
    "demonstration_seed",
    "held_out_seed",
    "load_suite",
    "sim_interface",
    "suite_names",
]

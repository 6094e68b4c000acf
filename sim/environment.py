"""Gymnasium environments, one id per suite: ``gymnasium.make("cogmerge/libero_object-v0", task=3)``.

Importing this module registers the ids; ``gymnasium.make("vla.sim.environment:cogmerge/...")`` imports it.
A seeded reset *is* a benchmark episode: ``reset(seed=s)`` starts recorded initial state ``s`` modulo their
number, so a plan of seeds is a plan of episodes, whatever the policy does in between.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from vla.errors import UserError
from vla.sim.episode import Episode, benchmark_episode, held_out_seed
from vla.sim.simulation import CONTROL_RATE, STATE_NAMES, LiberoSimulation
from vla.sim.suites import load_suite, suite_names

NAMESPACE = "cogmerge"


class LiberoEnvironment(gymnasium.Env):
    """One task of one suite.

    Observation: ``pixels`` with one (image_size, image_size, 3) uint8 image per camera, rotated as
    LIBERO policies expect, and ``agent_pos`` (8,) float32 (position, axis-angle, fingers). Action: (7,)
    float32 in [-1, 1], see `LiberoSimulation.step`. Reward: 1 at success, which terminates; truncation
    at the step limit of `step_limits` ("oft" or "lerobot").

    `images_every` is when frames are drawn: 1 at every step; k at the reset and every k-th step, which
    is when a policy that executes k actions per query looks, and the last frames are repeated in between;
    0 never (no ``pixels``). With `init_states` False every reset is random.
    The scene is built at the first reset; `UserError` if another is alive in this process.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_RATE}  # noqa: RUF012 (gymnasium)

    def __init__(
        self,
        suite: str,
        task: int = 0,
        *,
        image_size: int = 256,
        multisample: int = 4,
        images_every: int = 1,
        step_limits: str = "oft",
        init_states: bool = True,
        fast_step: bool = True,
        render_mode: str | None = "rgb_array",
    ):
        if images_every < 0:
            raise UserError(
                f"images_every is {images_every}; use 0 (never), 1 (always) or a number of steps."
            )
        self._suite, self._task = load_suite(suite), load_suite(suite).task(task)
        self.task, self.task_description = self._task.name, self._task.language  # LeRobot reads these two
        self._max_episode_steps = self._suite.step_limit(step_limits)  # and this one
        self._images_every = images_every
        self._random_resets = not init_states or self._suite.is_varied
        self._options = {"image_size": image_size, "multisample": multisample, "fast_step": fast_step}
        self.render_mode = render_mode
        self.observation_space = _observation_space(image_size if images_every else None)
        self.action_space = spaces.Box(-1.0, 1.0, (7,), np.float32)
        self.simulation: LiberoSimulation | None = None
        self._steps = 0
        self._frames: dict[str, np.ndarray] = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Start the episode that `seed` names, or one drawn from the generator of the last seed.

        ``options={"init_state": i}`` chooses a recorded initial state, ``{"episode": Episode(...)}`` the
        episode. Returns ``(observation, info)``; ``info["libero_episode"]`` says what was started.
        """
        super().reset(seed=seed)
        if self.simulation is None:
            self.simulation = LiberoSimulation(self._suite.name, self._task.index, **self._options)
        episode = self._episode(seed, options or {})
        self.simulation.reset(episode)
        self.task_description = self.simulation.language
        self._steps = 0
        return self._observation(), self._info(libero_episode=episode)

    def step(self, action: np.ndarray):
        """Execute one action for 1/20 s; raise `SimulationError` if the physics becomes unstable."""
        success = self._live_simulation().step(action)
        self._steps += 1
        truncated = not success and self._steps >= self._max_episode_steps
        return self._observation(), float(success), success, truncated, self._info()

    def render(self) -> np.ndarray:
        """Return the present frame of the fixed camera, as the policy sees it."""
        return self._live_simulation().images()["image"]

    def close(self) -> None:
        """Free the scene; a later reset builds it again."""
        if self.simulation is not None:
            self.simulation.close()
            self.simulation = None

    def _live_simulation(self) -> LiberoSimulation:
        if self.simulation is None:
            raise gymnasium.error.ResetNeeded("Call reset() first: the scene is built there.")
        return self.simulation

    def _episode(self, seed: int | None, options: dict[str, Any]) -> Episode:
        if "episode" in options:
            return options["episode"]
        suite, task = self._suite.name, self._task.index
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        if self._random_resets:
            return Episode(suite, task, None, held_out_seed(seed, suite, task, 0))
        count = self._suite.init_state_counts[task]
        return benchmark_episode(suite, task, options.get("init_state", seed % count))

    def _observation(self) -> dict[str, Any]:
        observation: dict[str, Any] = {"agent_pos": self.simulation.state()}
        if self._images_every:
            if self._steps % self._images_every == 0:
                self._frames = self.simulation.images()
            observation["pixels"] = dict(self._frames)
        return observation

    def _info(self, **more: Any) -> dict[str, Any]:
        return {"is_success": self.simulation.success, **more}


def _observation_space(image_size: int | None) -> spaces.Dict:
    entries: dict[str, spaces.Space] = {
        "agent_pos": spaces.Box(-np.inf, np.inf, (len(STATE_NAMES),), np.float32)
    }
    if image_size is not None:
        box = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        entries["pixels"] = spaces.Dict(dict.fromkeys(LiberoSimulation.CAMERAS, box))
    return spaces.Dict(entries)


def register_environments() -> None:
    """Register ``cogmerge/<suite>-v0`` for every suite; repeated calls change nothing."""
    for name in suite_names():
        identifier = f"{NAMESPACE}/{name}-v0"
        if identifier not in gymnasium.registry:
            gymnasium.register(identifier, entry_point=LiberoEnvironment, kwargs={"suite": name})


register_environments()

"""The tabletop as a Gymnasium environment: ``gymnasium.make("cogmerge/so101_tabletop-v0")``.

Importing this module registers the id; ``gymnasium.make("vla.sim.tabletop.environment:cogmerge/...")``
imports it. As in `vla.sim.environment`, ``reset(seed=s)`` starts benchmark episode ``s`` modulo their number.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from vla.robot_drivers.emulation.tabletop import CAMERAS
from vla.robot_drivers.so101.interface import to_policy
from vla.sim.episode import Episode, benchmark_episode, held_out_seed
from vla.sim.tabletop.simulation import CONTROL_RATE, IMAGE_SIZE, TabletopSimulation
from vla.sim.tabletop.suite import EPISODES, SUITE

IDENTIFIER = f"cogmerge/{SUITE}-v0"


class TabletopEnvironment(gymnasium.Env):
    """The emulated SO101 at its table.

    Observation: ``pixels`` with one (image_size, image_size, 3) uint8 image per camera, and ``agent_pos``
    (6,) float32 in degrees and percent. Action: (6,) float32, where the joints are to be, in the same units.
    Reward: 1 at success, which terminates; truncation after 375 steps. With `init_states` False every reset
    is random and belongs to no benchmark episode.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_RATE}  # noqa: RUF012 (gymnasium)

    def __init__(
        self,
        *,
        image_size: int = IMAGE_SIZE,
        init_states: bool = True,
        render_mode: str | None = "rgb_array",
    ):
        self.simulation = TabletopSimulation(image_size=image_size)
        self.task, self.task_description = self.simulation.task.name, self.simulation.language
        self._max_episode_steps = self.simulation.step_limit
        self._random_resets = not init_states
        self.render_mode = render_mode
        info = self.simulation.driver_info
        low, high = to_policy(info.lower), to_policy(info.upper)
        self.action_space = spaces.Box(low, high, dtype=np.float32)
        image = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "agent_pos": spaces.Box(-np.inf, np.inf, (len(low),), np.float32),
                "pixels": spaces.Dict(dict.fromkeys(CAMERAS, image)),
            }
        )
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Start the episode that `seed` names, or one drawn from the generator of the last seed.

        ``options={"episode": Episode(...)}`` chooses the episode. Returns ``(observation, info)``.
        """
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        episode = (options or {}).get("episode") or self._episode(seed)
        self.simulation.reset(episode)
        self._steps = 0
        return self._observation(), self._info(episode=episode)

    def step(self, action: np.ndarray):
        """Command joint positions (6,) for 1/25 s."""
        success = self.simulation.step(action)
        self._steps += 1
        truncated = not success and self._steps >= self._max_episode_steps
        return self._observation(), float(success), success, truncated, self._info()

    def render(self) -> np.ndarray:
        """Return the present frame of the camera above the table."""
        return self.simulation.images()["top"]

    def close(self) -> None:
        """Free the renderer."""
        self.simulation.close()

    def _episode(self, seed: int) -> Episode:
        if self._random_resets:
            return Episode(SUITE, 0, None, held_out_seed(seed, SUITE, 0, 0))
        return benchmark_episode(SUITE, 0, seed % EPISODES)

    def _observation(self) -> dict[str, Any]:
        return {"agent_pos": self.simulation.state(), "pixels": self.simulation.images()}

    def _info(self, **more: Any) -> dict[str, Any]:
        return {"is_success": self.simulation.success, **more}


if IDENTIFIER not in gymnasium.registry:
    gymnasium.register(IDENTIFIER, entry_point=TabletopEnvironment)

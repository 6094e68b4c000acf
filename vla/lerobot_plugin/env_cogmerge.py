"""LeRobot's view of our simulator: ``lerobot-eval --env.type=cogmerge_libero --env.task=libero_object``.

Unlike LeRobot's own LIBERO environment the images are already rotated and the state is one vector, so no
environment processor is needed; episode `seed` is recorded initial state ``seed`` modulo 50, so the evaluated
set does not depend on when the policy succeeds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import gymnasium as gym
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import (
    _LazyAsyncVectorEnv,
)  # all tasks are created at once; this one starts no process

from vla.contract import ACTION_KEY, IMAGE_PREFIX, STATE_KEY
from vla.errors import UserError

_CAMERAS = ("image", "image2")  # vla.sim.LiberoSimulation.CAMERAS; the simulator is an optional extra


@EnvConfig.register_subclass("cogmerge_libero")
@dataclass
class CogMergeLiberoEnv(EnvConfig):
    """`task` is one suite or several, separated by commas; `task_ids` restricts the tasks of each.

    `images_every`, `step_limits` ("oft" or "lerobot"), `init_states` and `multisample` are those of
    `vla.sim.environment.LiberoEnvironment`; set `images_every` to the policy's `n_action_steps` to draw
    only the frames it looks at.
    """

    task: str = "libero_object"
    task_ids: list[int] | None = None
    fps: int = 20
    image_size: int = 256
    multisample: int = 4
    images_every: int = 1
    step_limits: str = "oft"
    init_states: bool = True
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.fps != 20:
            raise UserError(f"LIBERO is controlled at 20 Hz; --env.fps={self.fps} is not possible.")
        size = self.image_size
        self.features = {
            ACTION_KEY: PolicyFeature(type=FeatureType.ACTION, shape=(7,)),
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(8,)),
        }
        self.features_map = {ACTION_KEY: ACTION_KEY, "agent_pos": STATE_KEY}
        for name in _CAMERAS:
            key = f"pixels/{name}"
            self.features[key] = PolicyFeature(type=FeatureType.VISUAL, shape=(size, size, 3))
            self.features_map[key] = IMAGE_PREFIX + name

    @property
    def gym_kwargs(self) -> dict:
        """Arguments of `LiberoEnvironment` shared by all tasks."""
        return {
            "image_size": self.image_size,
            "multisample": self.multisample,
            "images_every": self.images_every,
            "step_limits": self.step_limits,
            "init_states": self.init_states,
        }

    def create_envs(
        self, n_envs: int, use_async_envs: bool = True
    ) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """Return ``{suite: {task: vector environment}}``, each starting its scenes at the first reset.

        Several environments always run in processes of their own, one per scene, whatever
        `use_async_envs` says.
        """
        from vla.sim.suites import load_suite

        suites = [load_suite(name.strip()) for name in self.task.split(",")]
        return {
            suite.name: {
                task: self._vector_env(suite.name, task, n_envs)
                for task in (range(len(suite.tasks)) if self.task_ids is None else self.task_ids)
            }
            for suite in suites
        }

    def _vector_env(self, suite: str, task: int, n_envs: int) -> gym.vector.VectorEnv:
        from vla.sim.environment import LiberoEnvironment

        make = partial(LiberoEnvironment, suite, task, **self.gym_kwargs)
        if n_envs > 1:
            return _LazyAsyncVectorEnv([make] * n_envs)
        return gym.vector.SyncVectorEnv([make], autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)

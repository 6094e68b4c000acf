"""LeRobot's outside promises: its configuration finds our environment and its evaluation can run it."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env
from lerobot.envs.utils import close_envs, env_to_policy_features, preprocess_observation

import lerobot_policy_cogmerge  # noqa: F401 (what LeRobot's plug-in discovery imports)
from vla.errors import UserError


def config(**options):
    return EnvConfig.get_choice_class("cogmerge_libero")(**options)


def test_features_are_named_as_the_policy_expects_them():
    features = env_to_policy_features(config(image_size=128))
    assert {key: feature.shape for key, feature in features.items()} == {
        "action": (7,),
        "observation.state": (8,),
        "observation.images.image": (3, 128, 128),
        "observation.images.image2": (3, 128, 128),
    }


def test_one_environment_observes_what_lerobot_preprocesses(simulation_factory):
    simulation_factory.close()
    envs = make_env(config(task="libero_object", task_ids=[2], image_size=64), n_envs=1)
    (env,) = envs["libero_object"].values()
    try:
        assert env.call("_max_episode_steps") == (280,)
        assert env.call("task_description") == ("pick up the salad dressing and place it in the basket",)
        observation, _ = env.reset(seed=[1000])
        batch = preprocess_observation(observation)
        assert {key: tuple(value.shape) for key, value in batch.items()} == {
            "observation.images.image": (1, 3, 64, 64),
            "observation.images.image2": (1, 3, 64, 64),
            "observation.state": (1, 8),
        }
        _, _, terminated, truncated, info = env.step(np.zeros((1, 7), np.float32))
        assert not terminated[0] and not truncated[0] and info["is_success"].tolist() == [False]
    finally:
        close_envs(envs)


def test_all_tasks_of_several_suites_are_created_without_building_a_scene():
    envs = make_env(config(task="libero_object,libero_goal_swap"), n_envs=1)
    assert [len(tasks) for tasks in envs.values()] == [10, 10]
    assert isinstance(envs["libero_object"][0], gymnasium.vector.SyncVectorEnv)
    assert make_env(config(task_ids=[0]), n_envs=2)["libero_object"][0].num_envs == 2
    with pytest.raises(UserError, match="Did you mean 'libero_object"):
        make_env(config(task="libero_objekt"), n_envs=1)
    with pytest.raises(UserError, match="20 Hz"):
        config(fps=10)


@pytest.mark.slow
def test_environments_in_worker_processes_start_different_episodes():
    envs = make_env(config(task_ids=[0], image_size=64), n_envs=2, use_async_envs=True)
    env = envs["libero_object"][0]
    try:
        observation, info = env.reset(seed=[1000, 1001])
        assert [episode.init_state for episode in info["libero_episode"]] == [0, 1]
        assert not np.array_equal(observation["pixels"]["image"][0], observation["pixels"]["image"][1])
        env.step(np.zeros((2, 7), np.float32))
    finally:
        close_envs(envs)


@pytest.mark.slow
def test_lerobot_eval_runs_a_policy_in_it(tmp_path):
    save = runpy.run_path(str(Path(__file__).parents[1] / "evaluation" / "untrained_checkpoint.py"))
    checkpoint = save["save_untrained_nano"](tmp_path / "nano", image_size=128)
    result = subprocess.run(
        [
            Path(sys.executable).with_name("lerobot-eval"),
            f"--policy.path={checkpoint}",
            "--policy.device=cpu",
            "--env.type=cogmerge_libero",
            "--env.task=libero_object",
            "--env.task_ids=[0]",
            "--env.image_size=128",
            "--env.images_every=8",
            "--eval.n_episodes=1",
            "--eval.batch_size=1",
            f"--output_dir={tmp_path}/out",
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "eval_info.json").read_text())["overall"]["n_episodes"] == 1

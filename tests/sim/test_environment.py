import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import vla.sim.environment  # noqa: F401 (registers the ids)
from vla.errors import UserError
from vla.sim import Episode, benchmark_episode, suite_names
from vla.sim.environment import LiberoEnvironment


@pytest.fixture(scope="module")
def environment(_simulation_factory):
    _simulation_factory.close()
    environment = gymnasium.make("cogmerge/libero_object-v0", task=1, image_size=64)
    yield environment
    environment.close()


@pytest.fixture
def libero(environment) -> LiberoEnvironment:
    return environment.unwrapped


def test_every_suite_has_an_id():
    assert {f"cogmerge/{name}-v0" for name in suite_names()} <= set(gymnasium.registry)


def test_passes_gymnasiums_checker(libero):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(libero, skip_render_check=True)  # that check makes a second environment
    complaints = [str(warning.message) for warning in caught if "WARN" in str(warning.message)]
    assert all("infinity" in complaint for complaint in complaints), complaints  # positions are unbounded
    assert libero.render().shape == (64, 64, 3)


def test_says_what_lerobot_reads(libero):
    assert libero.task_description == "pick up the cream cheese and place it in the basket"
    assert libero.task.startswith("pick_up_the_cream_cheese")
    assert libero._max_episode_steps == 280
    assert libero.metadata["render_fps"] == 20


def test_a_seed_is_a_benchmark_episode(libero):
    observation, info = libero.reset(seed=1003)
    assert info["libero_episode"] == benchmark_episode("libero_object", 1, 3)
    assert info["is_success"] is False
    again, _ = libero.reset(options={"init_state": 3})
    assert np.array_equal(observation["agent_pos"], again["agent_pos"])
    assert np.array_equal(observation["pixels"]["image"], again["pixels"]["image"])
    chosen = Episode("libero_object", 1, None, 2**31)
    assert libero.reset(options={"episode": chosen})[1]["libero_episode"] == chosen


def test_unseeded_resets_follow_the_last_seed(libero):
    drawn = []
    for _ in range(2):
        libero.reset(seed=7)
        drawn.append([libero.reset()[1]["libero_episode"] for _ in range(2)])
    assert drawn[0] == drawn[1]


def test_truncates_at_the_limit_and_terminates_at_success(libero, monkeypatch):
    monkeypatch.setattr(libero, "_max_episode_steps", 2)
    libero.reset(seed=0)
    ends = [libero.step(np.zeros(7, np.float32))[1:4] for _ in range(2)]
    assert ends == [(0.0, False, False), (0.0, False, True)]

    libero.reset(seed=0)
    monkeypatch.setattr(libero.simulation.env, "_check_success", lambda: True)
    _, reward, terminated, truncated, info = libero.step(np.zeros(7, np.float32))
    assert (reward, terminated, truncated, info["is_success"]) == (1.0, True, False, True)


def test_draws_only_when_the_policy_looks(libero, monkeypatch):
    action = np.array([0.5, 0.5, -1, 0, 0, 0, 1], np.float32)
    libero.reset(seed=0)
    always = [libero.step(action)[0]["pixels"]["image"] for _ in range(6)]
    monkeypatch.setattr(libero, "_images_every", 3)
    start, _ = libero.reset(seed=0)
    sometimes = [libero.step(action)[0]["pixels"]["image"] for _ in range(6)]
    assert np.array_equal(sometimes[0], start["pixels"]["image"])  # repeated until the next look
    assert np.array_equal(sometimes[2], always[2]) and np.array_equal(sometimes[4], always[2])
    assert np.array_equal(sometimes[5], always[5]) and not np.array_equal(always[5], always[2])


def test_a_second_environment_is_refused_in_one_process(libero):
    libero.reset(seed=0)
    with pytest.raises(UserError, match="is alive in this process"):
        LiberoEnvironment("libero_object", 0).reset(seed=0)


def test_works_again_after_close(libero):
    libero.close()
    with pytest.raises(gymnasium.error.ResetNeeded):
        libero.step(np.zeros(7, np.float32))
    assert libero.reset(seed=0)[0]["pixels"]["image2"].std() > 5


def test_without_images_only_the_state_is_observed():
    environment = LiberoEnvironment("libero_object", 0, images_every=0, step_limits="lerobot")
    assert list(environment.observation_space) == ["agent_pos"]
    assert LiberoEnvironment("libero_spatial", step_limits="lerobot")._max_episode_steps == 280


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"suite": "libero_objects"}, "Did you mean 'libero_object"),
        ({"suite": "libero_object", "task": 99}, "has no task 99"),
        ({"suite": "libero_object", "step_limits": "otf"}, "Did you mean 'oft'"),
        ({"suite": "libero_object", "images_every": -1}, "images_every is -1"),
    ],
)
def test_mistakes_are_named(options, sentence):
    with pytest.raises(UserError, match=sentence):
        LiberoEnvironment(**options)

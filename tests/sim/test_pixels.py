"""Rendering on demand against LeRobot's `LiberoEnv`, which draws every frame: equal bit for bit."""

import subprocess
import sys

import numpy as np
import pytest

from vla.sim import benchmark_episode

SUITE, TASK = "libero_goal", 7  # turn on the stove: the flame's visibility is set between frames
STEPS, LIGHT_AT = 14, 6

LEROBOT_SIDE = f"""
import sys, numpy as np
from vla.sim import benchmark_episode
from vla.sim.rendering import find_backend
find_backend()
import lerobot.envs.libero as libero
libero.get_task_init_states = lambda suite, index, **_: suite.get_task_init_states(index)
env = libero.LiberoEnv(libero._get_suite({SUITE!r}), {TASK}, {SUITE!r}, obs_type="pixels_agent_pos",
                       observation_width=128, observation_height=128)
observation, _ = env.reset(seed=benchmark_episode({SUITE!r}, {TASK}, 0).seed)
seen = [observation]
for step, action in enumerate(np.load(sys.argv[1])):
    if step == {LIGHT_AT}:
        sim = env._env.sim
        sim.data.qpos[sim.model.get_joint_qpos_addr("flat_stove_1_button")] = 1.0
    seen.append(env.step(action)[0])
pixels, robots = [o["pixels"] for o in seen], [o["robot_state"] for o in seen]
np.savez(sys.argv[2],
    frames=[np.stack([p["image"], p["image2"]])[:, ::-1, ::-1] for p in pixels],
    states=[np.concatenate([r["eef"]["pos"], r["gripper"]["qpos"]]) for r in robots])
"""


@pytest.fixture(scope="module")
def always_on(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lerobot")
    actions = np.random.default_rng(0).uniform(-1, 1, (STEPS, 7)).astype(np.float32)
    np.save(folder / "actions.npy", actions)
    command = [sys.executable, "-c", LEROBOT_SIDE, folder / "actions.npy", folder / "seen.npz"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return actions, np.load(folder / "seen.npz")


@pytest.mark.parametrize("every", [1, 3])
def test_frames_and_proprioception_equal_always_on_rendering(simulation_factory, always_on, every):
    actions, expected = always_on
    sim = simulation_factory(SUITE, TASK, image_size=128)
    sim.reset(benchmark_episode(SUITE, TASK, 0))
    for step in range(STEPS + 1):
        if step > 0:
            if step - 1 == LIGHT_AT:
                data, model = sim.env.sim.data, sim.env.sim.model
                data.qpos[model.get_joint_qpos_addr("flat_stove_1_button")] = 1.0
            sim.step(actions[step - 1])
        assert np.array_equal(sim.state()[[0, 1, 2, 6, 7]], expected["states"][step].astype(np.float32))
        if step % every == 0:
            images = np.stack(list(sim.images().values()))
            assert np.array_equal(images, expected["frames"][step]), f"frame {step} differs"
        lit = (sim._model.site_rgba[sim._lamps, 3] > 0).all()
        assert lit == (step > LIGHT_AT)  # after the step; the frame of that step still shows no flame
        assert (sim._observed.lamp > 0).all() == (step > LIGHT_AT + 1)

"""Behaviour of one simulation; the numbered pitfalls are those that make LIBERO results incomparable."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from vla.errors import UserError
from vla.sim import Episode, LiberoSimulation, SimulationError, benchmark_episode, sim_interface

UP, OPEN, CLOSE = np.array([0, 0, 1, 0, 0, 0, -1.0]), np.zeros(7), np.zeros(7)
OPEN[6], CLOSE[6] = -1.0, 1.0


@pytest.fixture
def sim(simulation_factory):
    return simulation_factory("libero_goal", 0, image_size=64)


def episode(index=0, task=0, suite="libero_goal"):
    return benchmark_episode(suite, task, index)


def roll(sim, start: Episode, steps=6) -> np.ndarray:
    sim.reset(start)
    actions = np.random.default_rng(1).uniform(-1, 1, (steps, 7))
    for action in actions:
        sim.step(action)
    return sim.sim_state()


# ---------------------------------------------------------------- episodes


def test_an_episode_is_the_same_in_any_order_and_after_any_other(sim):
    first, other = roll(sim, episode(3)), roll(sim, episode(4))
    sim.reset(Episode("libero_goal", 0, None, 7))
    for _ in range(3):
        sim.step(CLOSE)  # a closed gripper and moved objects must not leak into the next episode
    assert np.array_equal(roll(sim, episode(3)), first)
    assert np.array_equal(roll(sim, episode(4)), other)
    assert not np.array_equal(first, other)


def test_an_episode_is_the_same_in_a_fresh_process_which_needs_less_than_two_gigabytes(sim):
    script = f"""
import json, torch
from vla.sim import LiberoSimulation
from pathlib import Path
import numpy as np, sys
sys.path.insert(0, {str(os.path.dirname(__file__))!r})
from test_simulation import roll, episode
with LiberoSimulation("libero_goal", 0, image_size=64) as sim:
    end = roll(sim, episode(3))
with LiberoSimulation("libero_10", 0) as sim:  # the largest scene; also: a second one after close()
    sim.reset(episode(0, 0, "libero_10"))
    mean = sim.images()["image"].mean()
# Not ru_maxrss: a child inherits the peak of the process that started it.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps([end.tolist(), mean, int(status["VmHWM"].split()[0]) * 1024]))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert "Exception ignored" not in result.stderr  # EGL is shut down in order
    end, mean, peak = json.loads(result.stdout.splitlines()[-1])
    assert np.array_equal(roll(sim, episode(3)), end)
    assert 20 < mean < 235
    assert peak < 2e9


def test_random_resets_follow_their_seed_and_lay_objects_where_the_task_says(sim):
    start = Episode("libero_goal", 0, None, 2**20 + 5)
    first = roll(sim, start)
    roll(sim, Episode("libero_goal", 0, None, 2**20 + 6))
    assert np.array_equal(roll(sim, start), first)
    sim.reset(start)
    assert not sim.success
    bodies = sim.env.sim.data.body_xpos
    assert all(abs(bodies[body][:2]).max() < 1.0 for body in sim.env.obj_body_id.values())


def test_fixture_poses_come_from_the_seed(sim):  # pitfall 5
    poses = []
    for seed in (1, 2, 1):
        sim.reset(Episode("libero_goal", 0, 0, seed), settle_steps=0)
        poses.append(sim.env.sim.model.body_pos[sim._fixtures].copy())
    assert np.array_equal(poses[0], poses[2])
    assert 0.001 < np.abs(poses[0] - poses[1]).max() < 0.1


def test_resets_leave_the_global_generators_alone(sim):
    np.random.seed(5)
    sim.reset(episode(0), settle_steps=0)
    drawn = np.random.random()
    np.random.seed(5)
    assert drawn == np.random.random()


def test_settling_takes_ten_steps_and_is_not_part_of_the_limit(sim):  # pitfalls 6 and 7
    sim.reset(episode(0))
    assert sim.env.sim.data.time == pytest.approx(10 / 20)
    assert sim.step_limit == 300
    sim.reset(episode(0), settle_steps=20)
    assert sim.env.sim.data.time == pytest.approx(20 / 20)


def test_a_scene_that_cannot_be_laid_out_is_an_error_not_an_endless_loop(sim, monkeypatch):  # pitfall 13
    from robosuite.utils.errors import RandomizationError

    def fail():
        raise RandomizationError("Cannot place all objects")

    monkeypatch.setattr(sim.env, "reset", fail)
    with pytest.raises(SimulationError, match="no free placement in 100 attempts"):
        sim.reset(episode(0))


# ---------------------------------------------------------------- actions


def test_the_gripper_opens_at_minus_one_and_closes_at_plus_one(sim):  # pitfall 2
    sim.reset(episode(0))
    for _ in range(15):
        sim.step(CLOSE)
    closed = sim.state()[6:]
    for _ in range(15):
        sim.step(OPEN)
    opened = sim.state()[6:]
    assert closed[0] < 0.005 and opened[0] > 0.035
    assert np.sign(opened[0]) == -np.sign(opened[1]) == 1  # the two fingers have opposite signs


def test_only_the_sign_of_the_gripper_command_counts(sim):
    ends = []
    for strength in (1.0, 0.01):
        sim.reset(episode(0))
        for _ in range(4):
            sim.step(CLOSE * strength)
        ends.append(sim.sim_state())
    assert np.array_equal(*ends)


def test_arm_actions_move_the_goal_in_the_world_frame(sim):  # pitfall 3
    sim.reset(episode(0))
    before = sim.state()[:3]
    for _ in range(8):
        sim.step(UP)
    moved = sim.state()[:3] - before
    assert 0.05 < moved[2] < 0.11 and np.abs(moved[:2]).max() < 0.01


def test_actions_are_clipped_to_one(sim):
    ends = []
    for size in (1.0, 7.0):
        sim.reset(episode(0))
        for _ in range(2):
            sim.step(np.r_[UP[:6] * size, -1.0])
        ends.append(sim.sim_state())
    assert np.array_equal(*ends)


@pytest.mark.parametrize("action", [np.zeros(6), np.zeros((1, 7)), np.full(7, np.nan)])
def test_malformed_actions_are_refused(sim, action):
    with pytest.raises(ValueError, match="7 finite entries"):
        sim.step(action)


# ---------------------------------------------------------------- observations


def test_state_is_position_axis_angle_and_fingers(sim):  # pitfall 4
    from scipy.spatial.transform import Rotation

    sim.reset(episode(0))
    state = sim.state()
    assert state.shape == (8,) and state.dtype == np.float32
    data, robot = sim.env.sim.data, sim.env.robots[0]
    wxyz = data.get_body_xquat(robot.robot_model.eef_name)
    expected = Rotation.from_quat(wxyz[[1, 2, 3, 0]])
    assert (Rotation.from_rotvec(state[3:6]) * expected.inv()).magnitude() < 0.01
    assert state[3] > 3.0  # near pi, where scipy's as_rotvec would flip the sign
    assert np.allclose(state[6:], data.qpos[robot._ref_gripper_joint_pos_indexes], atol=1e-3)


def test_the_observed_instant_lags_the_end_of_the_step_by_a_fraction_of_a_millimetre(sim):  # pitfall 9
    sim.reset(episode(0))
    for _ in range(5):
        sim.step(UP)
    sim.env.sim.forward()
    now = sim.env.sim.data.site_xpos[sim.env.robots[0].eef_site_id]
    lag = np.linalg.norm(now - sim.state()[:3])
    assert 1e-5 < lag < 2e-3
    assert np.array_equal(sim.images()["image"], sim.images()["image"])


def test_images_are_rotated_by_half_a_turn_once(sim):  # pitfall 1
    sim.reset(episode(0))
    images = sim.images()
    assert list(images) == ["image", "image2"]
    assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image in images.values())
    with sim._posed_as_observed() as data:
        raw = sim._renderer.render(data, "agentview")
    assert np.array_equal(images["image"], raw[::-1, ::-1])
    # The camera looks at the robot: its base is far away, hence in the upper half, and the cabinet at
    # positive y, which stands on the right of the real view, appears on the left of the policy's.
    cabinet = sim.env.sim.data.get_body_xpos(sim.env.fixtures_dict["wooden_cabinet_1"].root_body)
    assert cabinet[1] < 0
    pixel = _project(sim, cabinet + np.array([0, 0, 0.1]))
    assert pixel[1] < 40 and pixel[0] > 0


def _project(sim, point) -> tuple[int, int]:
    """Column and row of a world point in the policy's image."""
    import mujoco

    model, data = sim._model, sim._data
    camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "agentview")
    x, y, z = (point - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3)
    focal = 32 / np.tan(np.radians(model.cam_fovy[camera]) / 2)
    return int(32 + focal * x / z), int(32 + focal * y / z)


def test_looking_does_not_change_the_future(sim):
    ends, frames = [], []
    for look in (False, True):
        sim.reset(episode(2))
        for action in np.random.default_rng(3).uniform(-1, 1, (9, 7)):
            sim.step(action)
            if look:
                sim.images()
        ends.append(sim.sim_state())
        frames.append(sim.images())
    assert np.array_equal(*ends)
    assert all(np.array_equal(frames[0][name], frames[1][name]) for name in frames[0])


def test_the_interface_says_what_the_simulator_offers(sim):
    offer = sim_interface(64)
    assert [camera.key for camera in offer.cameras] == [
        "observation.images.image",
        "observation.images.image2",
    ]
    assert {(camera.height, camera.width) for camera in offer.cameras} == {(64, 64)}
    assert (offer.state.dim, offer.action.dim, offer.control_rate) == (8, 7, 20.0)
    assert offer.action_space == "osc_pose_delta"


# ---------------------------------------------------------------- save and restore


def test_a_saved_state_continues_bit_for_bit_and_draws_its_own_frame(sim):
    roll(sim, episode(1), steps=12)
    saved, seen, looked = sim.sim_state(), sim.state(), sim.images()
    actions = np.random.default_rng(2).uniform(-1, 1, (10, 7))
    for action in actions:
        sim.step(action)
    end = sim.sim_state()

    sim.reset(Episode("libero_goal", 0, None, 11))
    sim.set_sim_state(saved)
    assert np.array_equal(sim.sim_state(), saved) and np.array_equal(sim.state(), seen)
    assert all(np.array_equal(sim.images()[name], looked[name]) for name in looked)
    for action in actions:
        sim.step(action)
    assert np.array_equal(sim.sim_state(), end)


def test_a_state_of_another_scene_is_refused(sim):
    with pytest.raises(ValueError, match="libero_goal task 0 has"):
        sim.set_sim_state(np.zeros(5))


# ---------------------------------------------------------------- success, faults, life time


def test_success_fires_while_the_object_is_still_held(sim):  # pitfall 10
    sim.reset(episode(0))
    assert not sim.success
    drawer = sim.env.sim.model.joint_name2id("wooden_cabinet_1_middle_level")
    sim.env.sim.data.qpos[sim.env.sim.model.jnt_qposadr[drawer]] = -0.15  # open, nobody touches it
    assert sim.step(CLOSE) and sim.success
    assert sim.step(CLOSE)  # stepping on after success is allowed


def test_unstable_physics_raises_and_the_next_episode_is_clean(sim):
    reference = roll(sim, episode(5))
    sim.reset(episode(5))
    sim.env.sim.data.qvel[:] = 1e12
    with pytest.raises(SimulationError, match="became unstable"):
        sim.step(UP)
    assert np.array_equal(roll(sim, episode(5)), reference)


def test_a_second_simulation_in_the_process_is_refused(sim):
    with pytest.raises(UserError, match=r"libero_goal task 0 is alive in this process; call\s+close\(\)"):
        LiberoSimulation("libero_object", 0)
    sim.reset(episode(0))  # the refusal does not hurt the living one
    assert sim.images()["image"].max() > 0


def test_after_close_another_simulation_works_and_renders(simulation_factory):
    simulation_factory.close()
    frames = []
    for _ in range(2):
        with LiberoSimulation("libero_goal", 0, image_size=64) as simulation:
            simulation.reset(episode(0))
            frames.append(simulation.images()["image"])
    assert np.array_equal(*frames) and frames[0].std() > 10


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (episode(0, task=1), "make one simulation per task"),
        (Episode("libero_goal", 0, 50, 1), "initial states 0 to 49, not 50"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused(simulation_factory, wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        simulation_factory("libero_goal", 0, image_size=64).reset(wrong)


def test_an_object_inside_a_fixture_follows_it_at_random_resets(simulation_factory):
    # Placement adds the fixture's pose to its site, which it takes to be unmoved: without the pristine
    # pose the bowl of this task would be laid a cabinet's offset away from its drawer.
    sim = simulation_factory("libero_spatial", 4, image_size=64)
    for seed in (2**20, 2**20 + 1):
        sim.reset(Episode("libero_spatial", 4, None, seed))
        cabinet = sim.env.sim.data.get_body_xpos(sim.env.fixtures_dict["wooden_cabinet_1"].root_body)
        bowl = sim.env.sim.data.get_body_xpos(sim.env.objects_dict["akita_black_bowl_1"].root_body)
        assert np.linalg.norm((bowl - cabinet)[:2]) < 0.25


@pytest.mark.parametrize(("suite", "task"), [("libero_object_swap", 0), ("libero_10_task", 9)])
def test_derived_suites_run(simulation_factory, suite, task):
    sim = simulation_factory(suite, task, image_size=64)
    sim.reset(benchmark_episode(suite, task, 0))
    sim.step(OPEN)
    assert not sim.success and sim.images()["image"].std() > 10


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["libero_spatial", "libero_object", "libero_goal", "libero_10"])
def test_every_task_starts_unsolved_and_random_resets_do_too(simulation_factory, suite):
    for task in range(10):
        sim = simulation_factory(suite, task, image_size=64)
        for start in (benchmark_episode(suite, task, 0), Episode(suite, task, None, 2**20 + task)):
            first = roll(sim, start, steps=3)
            assert not sim.success
            roll(sim, benchmark_episode(suite, task, 1), steps=3)
            assert np.array_equal(roll(sim, start, steps=3), first)

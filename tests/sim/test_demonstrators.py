"""Scripted demonstrators: real demonstrations first, then the geometry and control they rest on."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from vla.errors import UserError
from vla.sim.demonstrators import CLEAN, DEFAULT, Demonstrator, demonstrate
from vla.sim.demonstrators.grasp import plan_grasps, search
from vla.sim.demonstrators.hand import hand_meets
from vla.sim.demonstrators.joint import moved
from vla.sim.demonstrators.motion import CLOSE, DOWN, OPEN, Limits, funnel, reach_tilt, servo, turned
from vla.sim.demonstrators.place import HeightMap
from vla.sim.demonstrators.push import is_dish
from vla.sim.demonstrators.scene import Joint, Pose, Scene, box_samples
from vla.sim.demonstrators.style import ActionNoise, Style
from vla.sim.demonstrators.table import DemonstratorTableConfig, Row, demonstrator_table, summarise
from vla.sim.episode import Episode, demonstration_seed
from vla.sim.simulation import LiberoSimulation

SUITE, TASK = "libero_object", 0
FREE = np.zeros((0, 3))


def episode(index: int) -> Episode:
    return Episode(SUITE, TASK, None, demonstration_seed(7, SUITE, TASK, index))


@pytest.fixture(scope="module")
def sim(_simulation_factory):
    _simulation_factory.close()
    with LiberoSimulation(SUITE, TASK) as simulation:
        yield simulation


# -- whole demonstrations ------------------------------------------------------------------------------


def test_a_demonstration_succeeds_and_stops_at_the_first_success(sim):
    result = demonstrate(sim, episode(0), seed=0)
    assert result.success and result.reason == "success" and sim.success
    assert 40 < result.steps == len(result.actions) < 160
    assert np.abs(result.actions).max() <= 1.0
    assert set(np.unique(result.actions[:, 6])) == {OPEN, CLOSE}


def test_the_same_seed_gives_the_same_actions_and_another_seed_others(sim):
    first = demonstrate(sim, episode(1), seed=3, style=replace(DEFAULT, action_noise=0.3), step_limit=40)
    again = demonstrate(sim, episode(1), seed=3, style=replace(DEFAULT, action_noise=0.3), step_limit=40)
    other = demonstrate(sim, episode(1), seed=4, style=replace(DEFAULT, action_noise=0.3), step_limit=40)
    np.testing.assert_array_equal(first.actions, again.actions)
    assert not np.array_equal(first.actions, other.actions)


def test_a_perturbed_demonstration_recovers_and_records_clean_labels(sim):
    pairs = []
    style = replace(DEFAULT, action_noise=0.5, burst_rate=0.08)
    result = demonstrate(
        sim, episode(2), seed=1, style=style, record=lambda _, clean, done: pairs.append((clean, done))
    )
    clean, executed = (np.array(column) for column in zip(*pairs, strict=True))
    perturbed = np.any(clean != executed, axis=1)
    assert result.success
    assert 5 < perturbed.sum() < len(pairs)
    np.testing.assert_array_equal(clean[:, 6], executed[:, 6])
    np.testing.assert_array_equal(executed, result.actions)


def test_a_shove_in_the_middle_is_survived(sim):
    sim.reset(episode(3))
    actions = Demonstrator(sim, seed=0, style=CLEAN).actions()
    for step, action in zip(range(200), actions, strict=False):
        executed = np.array([1.0, -1.0, 0.3, 0, 0, 0, action[6]]) if 20 <= step < 28 else action
        if sim.step(executed):
            return
    pytest.fail("not solved after a shove")


def test_the_record_sees_the_state_before_the_action(sim):
    seen = []
    demonstrate(sim, episode(0), seed=0, step_limit=3, record=lambda s, *_: seen.append(s.sim_state()))
    sim.reset(episode(0))
    np.testing.assert_array_equal(seen[0], sim.sim_state())


def test_a_start_elsewhere_is_not_recorded_and_changes_nothing_else(sim):
    def positions(seed, **changes):
        seen = []
        style = replace(DEFAULT, **changes)
        done = demonstrate(
            sim, episode(0), seed=seed, style=style, record=lambda s, *_: seen.append(s.state()[:3])
        )
        assert done.success and done.steps == len(seen)
        return np.array(seen)

    sim.reset(episode(0))
    home, spread = sim.state()[:3], 0.12
    starts = np.array([positions(seed, start_spread=spread)[0] - home for seed in (1, 2)])
    drawn = np.array([Style(start_spread=spread).draw_start(seed) for seed in (1, 2)])
    assert np.abs(drawn).max() <= spread and np.abs(drawn[:, 2]).max() <= spread / 2
    np.testing.assert_allclose(starts, drawn, atol=0.01)
    np.testing.assert_allclose(positions(1)[0], home, atol=1e-3)
    assert (
        Style(start_spread=spread).draw(np.random.default_rng(1)).limits
        == DEFAULT.draw(np.random.default_rng(1)).limits
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "task", "seed"),
    [
        ("libero_goal", 3, 587605292),  # the bowl slips down in the fingers while it is carried
        (
            "libero_10",
            3,
            41998284,
        ),  # the fingers slide up the rim of the bowl to its edge
        ("libero_10", 6, 1021832197),  # a box lies flat, too narrow for the cradle that pushes plates
        ("libero_10", 9, 543753423),  # something stands in front of the mug that goes into the microwave
    ],
)
def test_what_once_failed_is_solved(suite, task, seed, _simulation_factory):
    _simulation_factory.close()
    with LiberoSimulation(suite, task) as simulation:
        result = demonstrate(simulation, Episode(suite, task, None, seed), seed=seed)
    assert result.success, result.reason


@pytest.mark.slow
@pytest.mark.timeout(3600)  # 30 long demonstrations: 15 minutes are not enough where something runs beside it
@pytest.mark.parametrize("suite", ["libero_spatial", "libero_object", "libero_goal", "libero_10"])
def test_at_least_nine_in_ten_of_a_suite_are_solved(suite, tmp_path):
    config = DemonstratorTableConfig(out=tmp_path / suite, suites=(suite,), episodes=3)
    demonstrator_table(config)
    tasks = json.loads((config.out / "table.json").read_text())["tasks"]
    assert sum(t["successes"] for t in tasks) >= 0.9 * sum(t["episodes"] for t in tasks)


# -- the table -----------------------------------------------------------------------------------------


def test_the_table_resumes_without_doubling_and_refuses_a_used_folder(tmp_path):
    record = tmp_path / "episodes" / "libero_object_00.jsonl"
    record.parent.mkdir()
    lines = [json.dumps(vars(Row(SUITE, 0, i, i, i > 0, 90 + i, "success"))) for i in range(2)]
    record.write_text("\n".join(lines) + '\n{"suite": "libero_obj')  # the last line was cut by a kill
    config = DemonstratorTableConfig(out=tmp_path, suites=(SUITE,), tasks=(0,), episodes=2)
    with pytest.raises(UserError, match="--resume"):
        demonstrator_table(config)
    demonstrator_table(replace(config, resume=True))
    (entry,) = json.loads((tmp_path / "table.json").read_text())["tasks"]
    assert (entry["successes"], entry["episodes"], entry["mean_steps"]) == (1, 2, 91.0)


def test_wilson_interval_of_the_summary():
    rows = [Row(SUITE, 1, i, i, i < 9, 100, "success") for i in range(10)]
    (entry,) = summarise(rows)
    # Wilson 1927 for 9 of 10 at z = 1.96, by hand: centre 0.7888, half width 0.1933
    np.testing.assert_allclose(entry["interval"], [0.5958, 0.9821], atol=2e-4)


# -- control -------------------------------------------------------------------------------------------

vectors = st.tuples(*[st.floats(-3, 3)] * 3).map(np.array)


@given(vectors, vectors, vectors, vectors, st.floats(0.1, 1.0))
def test_servo_actions_are_bounded_and_point_at_the_target(start, turn, goal, goal_turn, speed):
    current = Pose(start, Rotation.from_rotvec(turn).as_matrix())
    target = Pose(goal, Rotation.from_rotvec(goal_turn).as_matrix())
    action = servo(current, target, CLOSE, Limits(speed=speed))
    assert action.shape == (7,) and np.abs(action).max() <= 1.0 + 1e-12
    assert np.abs(action[:3]).max() <= speed + 1e-12
    assert np.linalg.norm(np.cross(action[:3], goal - start)) < 1e-9 * (1 + np.linalg.norm(goal - start))


def test_servo_is_zero_at_the_target():
    pose = Pose(np.array([0.1, 0.2, 1.0]), turned(0.3))
    np.testing.assert_allclose(servo(pose, pose, OPEN, Limits())[:6], 0.0, atol=1e-12)


@given(st.floats(-0.3, 0.3), st.floats(-0.3, 0.3))
def test_the_funnel_keeps_the_hand_up_until_it_is_over_the_target(dx, dy):
    target = Pose(np.zeros(3), DOWN)
    wanted = funnel(Pose(np.array([dx, dy, 0.2]), DOWN), target, DOWN[:, 2], 0.1)
    assert 0.0 <= wanted.position[2] <= 0.1
    assert (wanted.position[2] == pytest.approx(0.1)) == (np.hypot(dx, dy) >= 0.008 + 0.1 / 3)


def test_the_hand_leans_outwards_only_when_far():
    base = np.array([-0.66, 0.0, 0.9])
    np.testing.assert_allclose(reach_tilt(base, np.array([-0.1, 0.2, 1.0])), np.eye(3))
    leaning = reach_tilt(base, np.array([0.1, 0.0, 1.0])) @ DOWN
    assert leaning[0, 2] > 0.1 and leaning[2, 2] < -0.9  # fingers point away from the base, and down


def test_noise_comes_in_bursts_within_bounds():
    noise = ActionNoise(replace(DEFAULT, action_noise=0.5), np.random.default_rng(0))
    clean = np.array([0.9, -0.9, 0.0, 0.0, 0.0, 0.1, 1.0])
    executed = np.array([noise(clean) for _ in range(2000)])
    off = np.any(executed != clean, axis=1)
    assert 0.1 < off.mean() < 0.6
    assert np.abs(executed).max() <= 1.0 and np.all(executed[:, 6] == 1.0)


# -- geometry ------------------------------------------------------------------------------------------


def test_a_bar_is_gripped_across_in_its_middle():
    bar = box_samples(np.array([0.08, 0.01, 0.03]))
    found = search(bar, Pose(np.zeros(3), np.eye(3)), FREE, [(turned(0.0), 0.0), (turned(np.pi / 2), 0.0)])
    best = min(found, key=lambda grasp: grasp.cost)
    assert best.width == pytest.approx(0.02)
    np.testing.assert_allclose(best.relative.position[:2], 0.0, atol=0.004)
    assert abs(best.relative.rotation[1, 0]) == pytest.approx(1.0)  # the fingers close along y


def test_a_block_wider_than_the_hand_has_no_grasp():
    block = box_samples(np.array([0.06, 0.06, 0.03]))
    assert not search(block, Pose(np.zeros(3), np.eye(3)), FREE, [(turned(0.0), 0.0)])


def test_grasps_keep_clear_of_a_wall():
    bar = box_samples(np.array([0.02, 0.01, 0.03]))
    wall = box_samples(np.array([0.1, 0.005, 0.1])).points + np.array([0.0, 0.05, 0.0])
    identity = Pose(np.zeros(3), np.eye(3))
    assert search(bar, identity, FREE, [(turned(0.0), 0.0)])
    assert not search(bar, identity, wall, [(turned(0.0), 0.0)])
    assert not hand_meets(wall, Pose(np.zeros(3), turned(np.pi / 2)), 0.02)
    assert hand_meets(wall, Pose(np.zeros(3), turned(0.0)), 0.02)


def test_planned_grasps_are_deterministic_and_prefer_the_start_yaw(sim):
    sim.reset(episode(4))
    scene = Scene(sim)
    name = scene.goal[0][1]
    first, again = plan_grasps(scene, name), plan_grasps(scene, name)
    assert [g.cost for g in first] == [g.cost for g in again]
    assert abs(first[0].hand(scene.pose(name)).rotation[1, 0]) > 0.95


def test_box_samples_lie_on_the_surface_with_outward_normals():
    half = np.array([0.03, 0.02, 0.01])
    cloud = box_samples(half)
    np.testing.assert_allclose(np.max(np.abs(cloud.points) / half, axis=1), 1.0)
    assert np.all(np.sum(cloud.points * cloud.normals, axis=1) > 0)


def test_a_shape_rests_on_the_highest_thing_under_it():
    ground = HeightMap(np.array([[0.0, 0.0, 0.1], [0.05, 0.0, 0.3]]), np.zeros(3), 0.2)
    shape = np.array([[0.0, 0.0, -0.02], [0.05, 0.0, 0.0]])
    assert ground.rest(shape, np.zeros(2)) == pytest.approx(0.3)
    assert ground.rest(shape[:1], np.zeros(2)) == pytest.approx(0.12)


@pytest.mark.parametrize(
    ("half", "dish"),
    [((0.1, 0.1, 0.012), True), ((0.1, 0.03, 0.012), False), ((0.1, 0.1, 0.02), False)],
)
def test_only_what_is_flat_and_wider_than_the_hand_is_pushed(half, dish):
    scene = SimpleNamespace(cloud=lambda name: box_samples(np.array(half)))
    assert is_dish(scene, "thing") is dish


def test_a_hinge_carries_a_pose_around_its_axis():
    hinge = Joint("door", 0.0, (-2.0, 0.0), np.array([0.0, 0.0, 1.0]), np.zeros(3), 0, False)
    turned_pose = moved(hinge, Pose(np.array([1.0, 0.0, 0.5]), np.eye(3)), np.pi / 2)
    np.testing.assert_allclose(turned_pose.position, [0.0, 1.0, 0.5], atol=1e-12)
    np.testing.assert_allclose(turned_pose.rotation[:, 0], [0.0, 1.0, 0.0], atol=1e-12)

import numpy as np
import pytest

from vla.errors import UserError
from vla.evaluation.plan import make_plan
from vla.sim import Episode, load_suite
from vla.sim.demonstrators import demonstrate
from vla.sim.suites import VARIED_SUITES, suite_names
from vla.sim.variation import VariedTask, _parse

SUITE = "libero_object_varied"


def varied(index: int) -> VariedTask:
    return VariedTask.of(load_suite(SUITE), index)


def test_a_varied_suite_has_the_tasks_of_its_base_and_is_no_benchmark():
    suite = load_suite(SUITE)
    assert [task.name for task in suite.tasks] == [task.name for task in load_suite("libero_object").tasks]
    assert suite.base == "libero_object" and suite.step_limit() == 280
    assert suite.init_state_counts == (0,) * 10
    assert not set(VARIED_SUITES) & set(suite_names())


@pytest.mark.parametrize("index", range(10))
def test_targets_layouts_and_sentences_agree_and_leave_out_what_libero_pro_asks(index):
    task = varied(index)
    asked = _parse(load_suite("libero_object_task").task(index).bddl_path)["goal_state"][0][1]
    swapped = _parse(load_suite("libero_object_swap").task(index).bddl_path)["initial_state"]
    assert task.held_out_target == asked
    assert set(task.held_out_layout) == {tuple(state) for state in swapped}
    places = {state[2] for state in task.initial_state}
    objects = {state[1] for state in task.initial_state}
    drawn = [task.draw(seed) for seed in range(300)]
    for variation in drawn:
        ((relation, target, region),) = variation.goal_state
        assert (relation, region) == ("in", "basket_1_contain_region")
        assert target not in (asked, "basket_1")
        assert {state[2] for state in variation.initial_state} == places
        assert {state[1] for state in variation.initial_state} == objects
        assert ("on", "basket_1", "floor_bin_region") in variation.initial_state
        assert set(variation.initial_state) != set(task.held_out_layout)
        mentioned = [name for name, phrase in task.phrases.items() if phrase in variation.language]
        assert mentioned == [target]
    assert {variation.goal_state[0][1] for variation in drawn} == set(task.targets)
    assert len(task.targets) == 5
    assert len({variation.language for variation in drawn}) == 10  # five targets, two wordings
    assert len({variation.initial_state for variation in drawn}) > 200


def test_the_layout_of_the_swap_suite_is_drawn_again(monkeypatch):
    task = varied(0)
    other = task.initial_state
    layouts = iter([task.held_out_layout, task.held_out_layout, other])
    monkeypatch.setattr(VariedTask, "_exchange", lambda self, rng: next(layouts))
    assert task.draw(0).initial_state == other


def test_equal_seeds_draw_equal_variations():
    task = varied(4)
    assert [task.draw(seed) for seed in range(20)] == [varied(4).draw(seed) for seed in range(20)]


def test_a_task_that_does_not_name_its_target_is_refused(monkeypatch):
    import vla.sim.suites as suites

    monkeypatch.setattr(suites, "VARIED_SUITES", ("libero_spatial_varied",))
    suites.load_suite.cache_clear()
    with pytest.raises(UserError, match="Task 0 of libero_spatial cannot be varied"):
        VariedTask.of(load_suite("libero_spatial_varied"), 0)
    suites.load_suite.cache_clear()


def test_an_evaluation_of_a_varied_suite_is_refused():
    with pytest.raises(UserError, match="belong to training; measure on libero_object"):
        make_plan(
            suites=[SUITE],
            tasks=None,
            init_states=None,
            episodes_per_task=None,
            seed=0,
            protocol="oft",
            max_steps=None,
            checkpoint_hash="0",
            n_action_steps=8,
            image_size=64,
        )


def test_a_reset_lays_out_its_variation_and_demonstrators_reach_its_goal(simulation_factory):
    task = varied(0)
    seeds = [2**20 + k for k in range(3)]
    sim = simulation_factory(SUITE, 0)
    before = {}
    for seed in seeds:
        sim.reset(Episode(SUITE, 0, None, seed))
        before[seed] = sim.sim_state()
        variation = task.draw(seed)
        assert sim.language == variation.language
        place = {region: name for _, name, region in variation.initial_state}
        lying = sim.env.object_states_dict[place["floor_target_object_region"]].get_geom_state()["pos"]
        assert np.abs(lying[:2] - [-0.12, -0.24]).max() < 0.06
    done = demonstrate(sim, Episode(SUITE, 0, None, seeds[0]), seed=seeds[0])
    assert done.success
    target = task.draw(seeds[0]).goal_state[0][1]
    assert sim.env._eval_predicate(["in", target, "basket_1_contain_region"])
    sim.reset(Episode(SUITE, 0, None, seeds[1]))  # whatever came before, a seed gives one state
    np.testing.assert_array_equal(sim.sim_state(), before[seeds[1]])

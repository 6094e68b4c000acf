from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.errors import UserError
from vla.evaluation.plan import Plan, make_plan
from vla.selection import parse_indices
from vla.sim.episode import BENCHMARK_SEEDS, benchmark_episode

DEFAULTS = {
    "suites": ("libero_object",),
    "tasks": "0,3",
    "init_states": None,
    "episodes_per_task": 4,
    "seed": 0,
    "protocol": "oft",
    "max_steps": None,
    "checkpoint_hash": "c" * 64,
    "n_action_steps": 8,
    "image_size": 128,
}


def plan(**options):
    return make_plan(**DEFAULTS | options)


def test_the_plan_is_the_benchmark_task_by_task():
    assert plan().episodes == tuple(
        benchmark_episode("libero_object", task, state) for task in (0, 3) for state in range(4)
    )


def test_everything_is_the_default():
    whole = plan(tasks=None, episodes_per_task=None)
    assert len(whole.episodes) == 10 * 50 and len(whole.tasks) == 10


def test_init_states_are_selected_before_they_are_counted():
    chosen = plan(init_states="20-49", episodes_per_task=3, tasks="1").episodes
    assert [episode.init_state for episode in chosen] == [20, 21, 22]


def test_tasks_are_selected_suite_by_suite():
    suites = ("libero_object", "libero_goal", "libero_10")
    chosen = plan(suites=suites, tasks="libero_goal:1,7-8 libero_object:2", episodes_per_task=1).tasks
    assert [(task.suite, task.task) for task in chosen] == [
        ("libero_object", 2),
        *(("libero_goal", task) for task in (1, 7, 8)),
        *(("libero_10", task) for task in range(10)),
    ]


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        ("libero_goat:1", r"names 'libero_goat', which is not in --suite. Did you mean 'libero_goal'\?"),
        ("libero_goal:1 3", "'3' is malformed; write SUITE:TASKS"),
        ("libero_goal:1 libero_goal:2", "names 'libero_goal' twice"),
        ("libero_goal:10", "libero_goal has no task 10; there are 0 to 9"),
    ],
)
def test_a_selection_of_tasks_that_cannot_be_meant_is_refused(tasks, sentence):
    with pytest.raises(UserError, match=sentence):
        plan(suites=("libero_goal",), tasks=tasks)


def test_step_limits_follow_the_protocol_and_only_get_shorter():
    suites = ("libero_spatial", "libero_10_swap")
    assert plan(suites=suites).step_limits == {"libero_spatial": 220, "libero_10_swap": 520}
    assert plan(suites=suites, protocol="lerobot").step_limits["libero_spatial"] == 280
    assert plan(suites=suites, max_steps=300).step_limits == {"libero_spatial": 220, "libero_10_swap": 300}


@given(seed=st.integers(0, 10_000))
def test_a_seed_moves_every_episode_within_the_benchmark_range(seed):
    moved = plan(seed=seed).episodes
    assert all(episode.seed in BENCHMARK_SEEDS for episode in moved)
    same = [a.seed == b.seed for a, b in zip(moved, plan().episodes, strict=True)]
    assert all(same) if seed == 0 else not any(same)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"suites": ("libero_objct",)}, "Did you mean 'libero_object'"),
        ({"tasks": "0,12"}, "libero_object has no task 12; there are 0 to 9"),
        ({"tasks": "one"}, "'one' is not a selection"),
        ({"tasks": "3-"}, "'3-' is not a selection"),
        ({"tasks": "5-3"}, "'5-3' selects nothing"),
        ({"init_states": "50"}, "no initial state 50; there are 0 to 49"),
        ({"episodes_per_task": 51}, "--episodes-per-task 51 does not fit: 50 initial states"),
        ({"episodes_per_task": 0}, "--episodes-per-task 0 does not fit"),
    ],
)
def test_bad_selections_are_refused_with_a_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence):
        plan(**options)


def test_selections_keep_order_and_drop_repeats():
    assert parse_indices("3, 0-2,1", 10, "") == [3, 0, 1, 2]


def test_a_saved_plan_comes_back(tmp_path):
    written = plan()
    written.save(tmp_path)
    assert Plan.load(tmp_path) == written


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"seed": ', '"seed": 1', "edited"),
        ('"version": 1', '"version": 7', "another release"),
        ("{", "", "not valid JSON"),
        ('"tasks"', '"jobs"', "malformed"),
    ],
)
def test_an_altered_plan_is_refused(tmp_path, old, new, sentence):
    path = plan().save(tmp_path)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=sentence):
        Plan.load(tmp_path)


def test_a_folder_without_a_plan_is_refused(tmp_path):
    with pytest.raises(UserError, match="not an evaluation folder"):
        Plan.load(tmp_path)


def test_the_hash_is_of_the_question_not_of_who_answers():
    mine = plan()
    assert mine.hash == plan(checkpoint_hash="d" * 64, n_action_steps=4).hash
    assert mine.hash == replace(mine, episodes=mine.episodes[::-1]).hash
    assert mine.hash not in (plan(max_steps=100).hash, plan(seed=1).hash, plan(episodes_per_task=3).hash)


def test_differences_are_named():
    mine = plan()
    assert mine.differences(plan()) == []
    (problem,) = mine.differences(plan(checkpoint_hash="d" * 64))
    assert problem == "checkpoint cccccccccccc against dddddddddddd"
    (problem,) = mine.differences(plan(episodes_per_task=3))
    assert problem == "8 episodes against 6, of which 6 are the same"
    (problem,) = mine.question_differences(plan(max_steps=100))
    assert problem == "step limits libero_object 280 against libero_object 100"

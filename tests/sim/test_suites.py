import pytest

from vla.errors import UserError
from vla.sim import load_suite, suite_names
from vla.sim.suites import STANDARD_SUITES


def test_lists_the_standard_suites_and_sixteen_derived_ones():
    names = suite_names()
    assert names[:5] == ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
    assert len(names) == len(set(names)) == 21
    assert {"libero_object_lan", "libero_10_swap", "libero_goal_task", "libero_object_object"} <= set(names)


@pytest.mark.parametrize("name", suite_names())
def test_every_listed_suite_is_complete(name):
    suite = load_suite(name)
    assert len(suite.tasks) == (90 if name == "libero_90" else 10)
    assert [task.index for task in suite.tasks] == list(range(len(suite.tasks)))
    for task in suite.tasks:
        assert task.bddl_path.is_file()
        assert suite.init_state_path(task.index).is_file()
        assert task.language == task.language.strip() != ""


@pytest.mark.parametrize("name", STANDARD_SUITES)
def test_standard_suites_have_fifty_initial_states_of_one_length_per_task(name):
    suite = load_suite(name)
    for task in suite.tasks[::9]:
        states = suite.init_states(task.index)
        assert states.dtype == "float64" and states.shape[0] == 50 and states.ndim == 2


def test_task_order_and_sentences_are_those_of_published_results():
    tasks = load_suite("libero_object").tasks
    assert tasks[0].language == "pick up the alphabet soup and place it in the basket"
    assert load_suite("libero_goal").tasks[7].language == "turn on the stove"
    assert (
        load_suite("libero_spatial").tasks[0].language.startswith("pick up the black bowl between the plate")
    )


def test_reworded_suites_take_their_sentence_from_the_bddl_file():
    plain, reworded = load_suite("libero_goal"), load_suite("libero_goal_lan")
    assert plain.tasks[9].name == reworded.tasks[9].name
    assert plain.tasks[9].language == "put the wine bottle on the rack"
    assert reworded.tasks[9].language == "place the wine bottle on the rack"


def test_step_limits_of_both_protocols():
    limits = {name: load_suite(name).step_limit() for name in STANDARD_SUITES}
    assert list(limits.values()) == [220, 280, 300, 520, 400]
    assert [load_suite(name).step_limit("lerobot") for name in STANDARD_SUITES] == [280, 280, 300, 520, 400]
    assert load_suite("libero_10_swap").step_limit() == 520
    assert load_suite("libero_object_object").step_limit() == 280


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: load_suite("libero_objet"), "Did you mean 'libero_object'?"),
        (lambda: load_suite("libero_object").task(10), "its tasks are 0 to 9"),
        (lambda: load_suite("libero_object").step_limit("ofd"), "Did you mean 'oft'?"),
    ],
)
def test_mistakes_are_named(call, sentence):
    with pytest.raises(UserError, match=sentence.replace("?", r"\?")):
        call()

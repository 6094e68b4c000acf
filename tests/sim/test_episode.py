from hypothesis import given
from hypothesis import strategies as st

from vla.sim import benchmark_episode, demonstration_seed, held_out_seed
from vla.sim.episode import BENCHMARK_SEEDS, DEMONSTRATION_SEEDS, HELD_OUT_SEEDS

SUITES = st.sampled_from(["libero_object", "libero_10", "libero_goal_swap"])


@given(SUITES, st.integers(0, 89), st.integers(0, 49), st.integers(0, 2**40))
def test_the_three_ranges_of_seeds_are_disjoint(suite, task, index, seed):
    assert benchmark_episode(suite, task, index).seed in BENCHMARK_SEEDS
    assert demonstration_seed(seed, suite, task, index) in DEMONSTRATION_SEEDS
    assert held_out_seed(seed, suite, task, index) in HELD_OUT_SEEDS
    assert BENCHMARK_SEEDS.stop == DEMONSTRATION_SEEDS.start
    assert DEMONSTRATION_SEEDS.stop == HELD_OUT_SEEDS.start
    assert HELD_OUT_SEEDS.stop == 2**32  # what np.random.seed accepts


def test_seeds_never_change_between_releases():
    assert benchmark_episode("libero_object", 1, 3).seed == 235899
    assert demonstration_seed(0, "libero_object", 1, 3) == 1072889782
    assert held_out_seed(0, "libero_object", 1, 3) == 2280849334


def test_every_demonstration_has_a_seed_of_its_own():
    seeds = {
        demonstration_seed(0, suite, task, i) for suite in ("a", "b") for task in range(10) for i in range(50)
    }
    assert len(seeds) == 1000

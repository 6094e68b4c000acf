import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from vla.evaluation.statistics import exact_paired_p, paired_difference_interval, wilson_interval

counts = st.integers(0, 60)


# Table I, method 3, of Newcombe, "Two-sided confidence intervals for the single proportion", 1998.
@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_published_examples(successes, episodes, low, high):
    assert wilson_interval(successes, episodes) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 3000), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_matches_scipy(episodes, data, confidence):
    successes = data.draw(st.integers(0, episodes))
    reference = binomtest(successes, episodes).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, episodes, confidence) == pytest.approx(tuple(reference), abs=1e-9)


@given(st.integers(1, 500), st.data())
def test_wilson_contains_the_rate_and_mirrors(episodes, data):
    successes = data.draw(st.integers(0, episodes))
    low, high = wilson_interval(successes, episodes)
    assert 0 <= low <= successes / episodes <= high <= 1
    assert wilson_interval(episodes - successes, episodes) == pytest.approx((1 - high, 1 - low))


def test_without_episodes_nothing_is_known():
    assert wilson_interval(0, 0) == (0, 1)
    assert exact_paired_p(0, 0) == 1
    assert paired_difference_interval(0, 0, 0, 0) == (-1, 1)


def test_wilson_refuses_more_successes_than_episodes():
    with pytest.raises(ValueError, match=r"0\.\.3"):
        wilson_interval(4, 3)


# By hand: 5 heads of 5 tosses, both sides: 2 / 32; at most 1 of 8: 2 (1 + 8) / 256.
@pytest.mark.parametrize(("only", "other", "p"), [(0, 5, 2 / 32), (1, 7, 18 / 256), (3, 3, 1.0), (0, 1, 1.0)])
def test_exact_paired_p_by_hand(only, other, p):
    assert exact_paired_p(only, other) == exact_paired_p(other, only) == pytest.approx(p)


@given(st.integers(0, 300), st.integers(0, 300))
def test_exact_paired_p_matches_scipy(only, other):
    reference = binomtest(only, only + other, 0.5).pvalue if only + other else 1.0
    assert exact_paired_p(only, other) == pytest.approx(reference, rel=1e-9)


@given(counts, counts, counts, counts)
def test_paired_interval_contains_the_difference_and_mirrors(both, first, second, neither):
    low, high = paired_difference_interval(both, first, second, neither)
    mirrored = paired_difference_interval(both, second, first, neither)
    assert mirrored == pytest.approx((-high, -low))
    n = both + first + second + neither
    if n:
        assert -1 <= low <= (second - first) / n + 1e-9 <= high + 2e-9 <= 1 + 3e-9


def test_paired_interval_approaches_the_normal_one_for_many_episodes():
    both, first, second, neither = 40_000, 9_000, 11_000, 40_000
    n = both + first + second + neither
    error = math.sqrt(first + second - (first - second) ** 2 / n) / n
    difference = (second - first) / n
    expected = (difference - 1.959964 * error, difference + 1.959964 * error)
    assert paired_difference_interval(both, first, second, neither) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("cells", [(0.5, 0.2, 0.1, 0.2), (0.05, 0.05, 0.4, 0.5), (0.9, 0.06, 0.01, 0.03)])
def test_paired_interval_covers_the_truth(cells):
    """Simulated from the model itself: about 95 of 100 intervals must contain the true difference."""
    tables = np.random.default_rng(0).multinomial(50, cells, size=4000)
    truth = cells[2] - cells[1]
    intervals = np.array([paired_difference_interval(*map(int, table)) for table in tables])
    covered = np.mean((intervals[:, 0] <= truth) & (truth <= intervals[:, 1]))
    assert 0.935 <= covered <= 0.998  # cautious near 100 % success

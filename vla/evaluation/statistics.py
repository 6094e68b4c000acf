"""Intervals and exact tests for success counts; every one names its source."""

from __future__ import annotations

import math
from statistics import NormalDist

CONFIDENCE = 0.95


def wilson_interval(successes: int, episodes: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the Wilson score interval of a success rate (Wilson, JASA 22, 1927).

    Unlike the normal approximation it is sensible for few episodes and for 0 % or 100 %. Without any
    episode nothing is known: (0, 1). Raises `ValueError` unless 0 <= successes <= episodes.
    """
    if not 0 <= successes <= episodes:
        raise ValueError(f"successes must lie in 0..{episodes}, got {successes}")
    if episodes == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate, spread = successes / episodes, z * z / episodes
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / episodes + spread / (4 * episodes))
    # The bound is exactly 0 or 1 at the ends; rounding must not push it off by one ulp.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == episodes else centre + half
    return low, high


def exact_paired_p(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    `only_first` and `only_second` count the episodes that just one of two policies solved. If both are
    equally good, each such episode is a fair coin: the sign test on discordant pairs (McNemar,
    Psychometrika 12, 1947). Episodes on which both agree say nothing about the difference.
    """
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def paired_difference_interval(
    both: int, only_first: int, only_second: int, neither: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the interval of (rate of the second policy) - (rate of the first) over the same episodes.

    Newcombe's square-and-add interval for paired proportions (method 10 of Statistics in Medicine 17,
    2635-2650, 1998): the two Wilson intervals combined with the correlation of the pairs. The four
    counts are the cells of the paired table; without any episode nothing is known: (-1, 1).
    """
    episodes = both + only_first + only_second + neither
    if episodes == 0:
        return -1.0, 1.0
    first, second = (both + only_first) / episodes, (both + only_second) / episodes
    low1, high1 = wilson_interval(both + only_first, episodes, confidence)
    low2, high2 = wilson_interval(both + only_second, episodes, confidence)
    phi = _pair_correlation(both, only_first, only_second, neither)
    difference = second - first
    down, up = second - low2, high1 - first
    low = difference - math.sqrt(max(0.0, down**2 - 2 * phi * down * up + up**2))
    down, up = first - low1, high2 - second
    high = difference + math.sqrt(max(0.0, down**2 - 2 * phi * down * up + up**2))
    return max(-1.0, low), min(1.0, high)


def _pair_correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Newcombe's phi: the table's correlation, a positive one reduced by half a pair's worth."""
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    determinant = both * neither - only_first * only_second
    if determinant > 0:
        determinant = max(determinant - (both + only_first + only_second + neither) / 2, 0.0)
    return determinant / math.sqrt(margins)

"""No sequence of inputs gets a setpoint out of the limits; a well-behaved one passes unaltered."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.errors import UserError
from vla.robot_drivers import DriverInfo, Joint, LimitViolation, SafetyFilter
from vla.robot_drivers.safety_filter import LONGEST_STEP, stopping_velocity

EPSILON = 1e-7


def arm(*limits: tuple[float, float, float, float]) -> DriverInfo:
    joints = tuple(Joint(f"j{i}", *limit) for i, limit in enumerate(limits))
    return DriverInfo("arm", joints, 100, "falls")


ONE = arm((-1.0, 1.0, 2.0, 10.0))

LIMITS = st.tuples(st.floats(-4, 4), st.floats(0.1, 8), st.floats(0.05, 20), st.floats(0.1, 200)).map(
    lambda t: (t[0], t[0] + t[1], t[2], t[3])
)

STRANGE = [math.nan, math.inf, -math.inf, 1e308, -1e308, 1e-320]
BRISK = st.tuples(st.floats(0.1, 4), st.floats(1, 20), st.floats(2, 200)).map(lambda t: (0.0, *t))
NUMBERS = st.one_of(st.floats(-12, 12), st.sampled_from([*STRANGE, None, "fast", 10**400]))
KEYS = st.sampled_from(["j0", "j1", "j2", "gripper", 0, None])
SETPOINTS = st.one_of(
    st.none(),
    st.fixed_dictionaries({"j0": st.floats(-12, 12), "j1": st.floats(-12, 12)}),
    st.dictionaries(KEYS, NUMBERS, max_size=3),
)
MEASURED = st.one_of(
    st.tuples(st.floats(-12, 12), st.floats(-12, 12)),
    st.tuples(st.sampled_from(STRANGE), st.floats(-1, 1)),
    st.just((0.0,)),
)
INTERVALS = st.one_of(
    st.floats(0.001, 0.05), st.sampled_from([0.0, -0.01, -100.0, 1e-12, 1e-4, 0.3, 5.0, math.nan, math.inf])
)


@settings(max_examples=150)
@given(
    st.tuples(LIMITS, LIMITS),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.lists(st.tuples(INTERVALS, SETPOINTS, MEASURED), max_size=40),
    st.floats(0, 0.4),
)
def test_no_sequence_of_inputs_leaves_the_limits(limits, begin, calls, margin):
    """Checked on what is sent alone: positions and the times at which they change."""
    info = arm(*limits)
    filter = SafetyFilter(info, margin=margin)
    state = filter.start(0.0, info.lower + np.array(begin) * (info.upper - info.lower))
    now, sent = 0.0, [(0.0, state.q)]
    for interval, setpoint, measured in calls:
        before = state
        state, _ = filter.step(state, now + interval, setpoint, np.array(measured))
        now = max(now, now + interval) if math.isfinite(interval) else now
        if state.time == before.time:
            assert np.array_equal(state.q, before.q)
        else:
            sent.append((state.time, state.q))
    check_bounds(info, sent)
    low, high = (
        info.lower + margin * (info.upper - info.lower),
        info.upper - margin * (info.upper - info.lower),
    )
    for (_, q), (_, following) in pairwise(sent):  # never further out than before
        assert (following >= np.minimum(low, q)).all() and (following <= np.maximum(high, q)).all()


def check_bounds(info: DriverInfo, sent: list[tuple[float, np.ndarray]]) -> None:
    velocity = np.zeros(len(info.joints))
    for (t0, q0), (t1, q1) in pairwise(sent):
        assert np.isfinite(q1).all() and (q1 >= info.lower).all() and (q1 <= info.upper).all()
        stalled = t1 - t0 > LONGEST_STEP
        new = (q1 - q0) / (LONGEST_STEP if stalled else t1 - t0)
        assert (np.abs(q1 - q0) <= info.velocity * (t1 - t0) * (1 + EPSILON) + 1e-12).all()
        change = np.abs(new - (0 if stalled else velocity))
        assert (change <= info.acceleration * min(t1 - t0, LONGEST_STEP) * (1 + EPSILON) + 1e-8).all()
        velocity = new


@settings(max_examples=40)
@given(BRISK, st.floats(0, 1), st.booleans(), st.sampled_from([0.005, 0.01, 0.02]), st.floats(0, 0.1))
def test_a_run_into_a_limit_is_braked_before_it(limits, begin, up, dt, margin):
    info = arm(limits)
    filter = SafetyFilter(info, margin=margin, following_error=10)
    state = filter.start(0.0, info.lower + begin * (info.upper - info.lower))
    sent = [(0.0, state.q)]
    for k in range(1, 200):
        state, _ = filter.step(state, k * dt, {"j0": 99.0 if up else -99.0}, state.q)
        sent.append((state.time, state.q))
    check_bounds(info, sent)


@settings(max_examples=50)
@given(LIMITS, st.lists(st.floats(0, 1), min_size=1, max_size=80))
def test_what_the_filter_sends_passes_a_second_filter_unaltered(limits, wishes):
    info = arm(limits)
    first = SafetyFilter(info)
    middle = (info.lower + info.upper) / 2
    state = again = first.start(0.0, middle)
    for k, wish in enumerate(wishes, 1):
        asked = {"j0": float(info.lower[0] + wish * (info.upper - info.lower)[0])}
        state, _ = first.step(state, 0.01 * k, asked, state.q)
        again, interventions = first.step(again, 0.01 * k, {"j0": float(state.q[0])}, state.q)
        assert np.allclose(again.q, state.q, atol=1e-9)
        assert not interventions


def follow(filter: SafetyFilter, q: float, target: float, steps: int, dt=0.01, measured=None) -> np.ndarray:
    state = filter.start(0.0, np.array([q]))
    path = [q]
    for k in range(1, steps + 1):
        at = state.q if measured is None else np.array([measured])
        state, _ = filter.step(state, k * dt, {"j0": target}, at)
        path.append(state.q[0])
    return np.array(path)


def test_a_jump_becomes_a_trapezoid_that_takes_the_minimum_time():
    """1.2 rad at 2 rad/s and 10 rad/s²: 0.2 s up, 0.4 s of 2 rad/s, 0.2 s down, 0.8 s in all."""
    path = follow(SafetyFilter(ONE), -0.6, 0.6, 120, dt=0.01)
    assert path[20] == pytest.approx(-0.6 + 0.2, abs=0.03)  # 10 * 0.2² / 2
    assert np.diff(path).max() == pytest.approx(0.02)
    assert abs(path[70] - 0.6) > 0.01 and abs(path[90] - 0.6) < 0.01 and path[-1] == pytest.approx(0.6)


@settings(max_examples=40)
@given(BRISK, st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.01, 0.02]))
def test_a_resting_target_is_reached_and_not_overshot(limits, begin, end, dt):
    info = arm(limits)
    filter = SafetyFilter(info, following_error=10)
    span = limits[1] - limits[0]
    q, target = (limits[0] + (0.02 + 0.96 * share) * span for share in (begin, end))
    needed = span / limits[2] + limits[2] / limits[3] + 2 * math.sqrt(span / limits[3])
    path = follow(filter, q, target, int(needed / dt) + 20, dt)
    assert ((path - target) * np.sign(target - q)).max() <= 1e-6 * limits[3] * dt**2 + 1e-12
    assert abs(path[-1] - target) < 1e-3 * span + 2 * limits[3] * dt**2


@settings(max_examples=40)
@given(BRISK, st.floats(0.02, 0.98), st.floats(0.02, 0.98), st.floats(0.004, 0.09), st.integers(0, 2**32))
def test_a_slow_computer_makes_no_arm_run_past_its_target(limits, begin, end, longest, seed):
    """However irregular the cycles: at most what a step's change of velocity takes to be braked again."""
    filter = SafetyFilter(arm(limits), following_error=10)
    q, target = begin * limits[1], end * limits[1]
    state = filter.start(0.0, np.array([q]))
    for interval in np.random.default_rng(seed).uniform(0.004, longest, 150):
        state, _ = filter.step(state, state.time + interval, {"j0": target}, state.q)
        past = (state.q[0] - target) * np.sign(target - q)
        assert past <= limits[3] * longest**2 / 2 * (1 + EPSILON) + 1e-12


def test_a_setpoint_in_motion_is_met_however_fast_it_is():
    filter = SafetyFilter(ONE, following_error=10)
    state = filter.start(0.0, np.array([-0.95]))
    for interval in np.random.default_rng(0).uniform(0.004, 0.03, 55):
        now = state.time + interval
        asked = now**2 - 0.95  # rad, at 2 rad/s²: a fifth of the limit, for cycles of very different lengths
        state, interventions = filter.step(state, now, {"j0": asked}, state.q)
        assert state.q[0] == pytest.approx(asked, abs=1e-9) and not interventions
    assert 1.7 < state.v[0] < 2.0


def test_a_blocked_joint_is_not_pushed_further_than_the_following_error():
    filter = SafetyFilter(ONE, following_error=0.1)  # 0.2 rad of a range of 2 rad
    path = follow(filter, 0.0, 0.9, 300, measured=0.0)
    assert path[-1] == pytest.approx(0.2, abs=1e-6) and path.max() < 0.2 + 1e-9
    state = filter.start(0.0, np.zeros(1))
    assert filter.step(state, 0.01, {"j0": 0.9}, np.zeros(1)).interventions == {"j0": "following error"}


@pytest.mark.parametrize(
    ("setpoint", "words"),
    [
        ({"j0": math.nan}, "not finite"),
        ({"j0": None}, "not made of numbers"),
        ({"elbow": 0.1}, "has joints"),
        ({}, "has joints"),
        ({"j0": 0.1, "j1": 0.0}, "has joints"),
    ],
)
def test_a_refused_setpoint_brakes_the_moving_arm(setpoint, words):
    filter = SafetyFilter(ONE)
    state = filter.start(0.0, np.zeros(1))
    for k in range(1, 11):
        state, _ = filter.step(state, 0.01 * k, {"j0": 0.9}, state.q)
    assert state.v[0] == pytest.approx(1.0)
    for k in range(11, 21):
        state, interventions = filter.step(state, 0.01 * k, setpoint, state.q)
        assert words in interventions["setpoint"]
    assert state.v[0] == pytest.approx(0.0, abs=1e-9)


def test_an_arm_leaning_on_its_stop_is_let_inwards_only():
    filter = SafetyFilter(ONE, margin=0.05)
    state = filter.start(0.0, np.array([1.015]))  # a little beyond the calibrated limit
    assert state.q[0] == 1.0
    for k in range(1, 20):
        state, interventions = filter.step(state, 0.01 * k, {"j0": 1.0}, np.array([1.0]))
        assert interventions["j0"] == "limit"
    assert state.q[0] == pytest.approx(0.9, abs=0.06) and state.q[0] <= 1.0
    with pytest.raises(LimitViolation, match=r"'j0' is at 1.300, allowed -1.000 to 1.000 rad"):
        filter.start(0.0, np.array([1.3]))
    with pytest.raises(LimitViolation):
        filter.start(0.0, np.array([math.nan]))


def test_a_caller_that_was_away_starts_from_standstill():
    filter = SafetyFilter(ONE)
    state = filter.start(0.0, np.zeros(1))
    for k in range(1, 11):
        state, _ = filter.step(state, 0.01 * k, {"j0": 0.9}, state.q)
    later, _ = filter.step(state, state.time + 30.0, {"j0": 0.9}, state.q)
    assert later.q[0] - state.q[0] <= 10.0 * LONGEST_STEP**2 + 1e-9


@given(st.floats(0, 10), st.floats(0.01, 300), st.floats(1e-4, 0.1))
def test_stopping_velocity_solves_its_equation(distance, a, dt):
    v = float(stopping_velocity(np.array(distance), np.array(a), dt))
    assert v * dt + v**2 / (2 * a) == pytest.approx(distance, rel=1e-9, abs=1e-12)


def test_nonsense_margins_are_refused():
    for options in ({"margin": 0.5}, {"margin": math.nan}, {"following_error": 0.0}):
        with pytest.raises(UserError, match="margin"):
            SafetyFilter(ONE, **options)

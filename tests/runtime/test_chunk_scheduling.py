"""Chunk schedulers under a policy that takes its time: what goes out, when, and made of what."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.errors import UserError
from vla.runtime.chunk_scheduling import SCHEDULERS, Arrival, make_scheduler
from vla.runtime.chunk_scheduling.real_time import old_plan_weights
from vla.runtime.chunk_scheduling.temporal_ensembling import DECAY

PERIOD = 0.05
NAMES = sorted(SCHEDULERS)


@dataclass
class Loop:
    """A control loop and a policy whose n-th answer (n = 1, 2, ...) comes `delays[n - 1]` periods later.

    Row ``i`` of the n-th chunk, asked at step ``s``, is ``(n, s + i)``: every action says what it is of.
    """

    scheduler: object
    chunk_size: int
    delays: list[int]
    before: int = 0  # queries of earlier episodes
    emitted: list = field(default_factory=list)  # one per period, None where nothing was planned
    arrivals: list = field(default_factory=list)  # (period, query, Arrival)
    asked: list = field(default_factory=list)

    def run(self, periods: int) -> "Loop":
        waiting = None  # the query under way and the period of its answer
        for period in range(periods):
            now = period * PERIOD
            for _ in range(2):  # an answer without delay is there in the period of its question
                if waiting is not None and period >= waiting[1]:
                    arrival = self.scheduler.receive(waiting[0], self.chunk(waiting[0]), now)
                    self.arrivals.append((period, waiting[0], arrival))
                    waiting = None
                if waiting is None and self.scheduler.wants_observation:
                    query = self.scheduler.ask(now)
                    self.asked.append(query)
                    waiting = query, period + self.delays[(self.number(query) - 1) % len(self.delays)]
            action = self.scheduler.next_action(now)
            self.emitted.append(None if action is None else action.tolist())
        return self

    def number(self, query) -> int:
        return query.number - self.before

    def chunk(self, query) -> np.ndarray:
        return np.array([[self.number(query), query.step + i] for i in range(self.chunk_size)], dtype=float)

    @property
    def executed(self):
        return [action for action in self.emitted if action is not None]


@st.composite
def loops(draw, names=tuple(NAMES)):
    chunk_size = draw(st.integers(1, 10))
    horizon = draw(st.integers(1, chunk_size))
    delays = draw(st.lists(st.integers(0, 14), min_size=1, max_size=6))
    return Loop(make_scheduler(draw(st.sampled_from(names)), chunk_size, horizon), chunk_size, delays)


@given(loops())
def test_every_action_is_of_predictions_for_its_own_step_that_had_arrived(loop):
    loop.run(60)
    executed = 0
    for period, action in enumerate(loop.emitted):
        if action is None:
            continue
        numbers = [
            query.number
            for arrived, query, _ in loop.arrivals
            if arrived <= period and query.step <= executed < query.step + loop.chunk_size
        ]
        assert numbers, "an action without a prediction"
        assert action[1] == pytest.approx(executed, abs=1e-9)
        assert min(numbers) - 1e-9 <= action[0] <= max(numbers) + 1e-9
        executed += 1
    assert loop.scheduler.step == executed == len(loop.executed)
    assert loop.scheduler.starved == 60 - executed


@given(loops(names=("execute_all", "receding_horizon")))
def test_without_mixing_an_action_is_a_row_of_one_chunk_and_chunks_never_go_back(loop):
    loop.run(60)
    numbers = [action[0] for action in loop.executed]
    assert all(float(n).is_integer() for n in numbers)
    assert numbers == sorted(numbers)


@given(loops())
def test_what_is_measured_is_what_was_executed_meanwhile(loop):
    loop.run(60)
    for period, query, arrival in loop.arrivals:
        asked_in = round(query.time / PERIOD)
        executed = sum(action is not None for action in loop.emitted[asked_in:period])
        assert arrival.delay == executed
        assert arrival.seconds == pytest.approx((period - asked_in) * PERIOD)
        assert arrival.used == max(loop.chunk_size - executed, 0)


@given(loops(names=("receding_horizon", "real_time")))
def test_a_late_chunk_is_joined_at_the_step_where_the_arm_is(loop):
    loop.run(60)
    for period, query, arrival in loop.arrivals:
        action = loop.emitted[period]
        if arrival.used:  # the action after an arrival is row `delay`, not row 0
            assert action[1] == pytest.approx(query.step + arrival.delay)


@given(loops())
def test_after_a_reset_the_same_calls_give_the_same_actions(loop):
    first = loop.run(40).emitted
    loop.scheduler.reset()
    again = Loop(loop.scheduler, loop.chunk_size, loop.delays, before=len(loop.asked))
    assert again.run(40).emitted == first


@given(st.integers(1, 12), st.data())
def test_without_latency_every_scheduler_executes_horizon_actions_per_query(chunk_size, data):
    horizon = data.draw(st.integers(1, chunk_size))
    for name in NAMES:
        loop = Loop(make_scheduler(name, chunk_size, horizon), chunk_size, [0]).run(30)
        assert loop.scheduler.starved == 0
        assert [query.step for query in loop.asked] == list(range(0, 30, horizon))


@given(st.integers(1, 12))
def test_over_whole_chunks_without_latency_all_schedulers_are_the_same(chunk_size):
    emitted = [
        Loop(make_scheduler(n, chunk_size, chunk_size), chunk_size, [0]).run(30).emitted for n in NAMES
    ]
    assert all(actions == emitted[0] for actions in emitted)


def test_execute_all_stands_still_while_the_policy_thinks_and_receding_horizon_does_not():
    waits = Loop(make_scheduler("execute_all", 4), 4, [2]).run(12)
    assert [a and a[0] for a in waits.emitted] == [None, None, 1, 1, 1, 1, None, None, 2, 2, 2, 2]
    goes_on = Loop(make_scheduler("receding_horizon", 4, 2), 4, [2]).run(12)
    # Asked after two actions, two more go out meanwhile, and the answer is joined at its third row.
    assert [a and a[0] for a in goes_on.emitted] == [None, None, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [a[1] for a in goes_on.executed] == list(range(10))


def test_a_chunk_that_is_wholly_in_the_past_is_dropped_and_the_policy_asked_again():
    scheduler = make_scheduler("receding_horizon", 4, 1)
    scheduler.receive(scheduler.ask(0.0), np.zeros((4, 1)), 0.0)
    scheduler.next_action(0.0)
    query = scheduler.ask(0.1)
    while scheduler.next_action(0.1) is not None:
        pass
    assert scheduler.receive(query, np.ones((2, 1)), 0.2) == Arrival(3, pytest.approx(0.1), 0)
    assert scheduler.next_action(0.2) is None
    assert scheduler.wants_observation


def test_real_time_blends_as_worked_by_hand():
    # Chunks of 4, asked after 1 action, 1 more goes out meanwhile: H = 4, s = 1, d = 1, the plans share
    # steps 2 and 3. c = 2/3 and 1/3, W = c (e^c - 1) / (e - 1).
    scheduler = make_scheduler("real_time", 4, 1)
    scheduler.receive(scheduler.ask(0.0), np.zeros((4, 1)), 0.0)
    assert scheduler.next_action(0.0) == 0
    query = scheduler.ask(0.05)
    assert scheduler.next_action(0.05) == 0
    assert scheduler.receive(query, np.full((4, 1), 10.0), 0.1).delay == 1
    sent = [scheduler.next_action(0.1).item() for _ in range(3)]
    assert sent == pytest.approx([10 * (1 - 0.36770614), 10 * (1 - 0.07674574), 10], abs=1e-6)
    assert scheduler.next_action(0.1) is None


@given(st.integers(2, 40), st.data())
def test_the_weights_are_equation_5(chunk_size, data):
    s = data.draw(st.integers(1, chunk_size - 1))
    d = data.draw(st.integers(0, chunk_size - s))
    expected = []
    for i in range(d, chunk_size - s):
        c = (chunk_size - s - i) / (chunk_size - s - d + 1)
        expected.append(c * (math.e**c - 1) / (math.e - 1))
    weights = old_plan_weights(chunk_size - s - d)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert (weights > 0).all() and (weights < 1).all() and (np.diff(weights) < 0).all()


@given(loops(), st.integers(0, 2**31))
def test_chunks_that_agree_are_executed_as_they_are(loop, seed):
    course = np.random.default_rng(seed).normal(size=(100, 3))
    loop.chunk = lambda query: course[query.step : query.step + loop.chunk_size]
    executed = loop.run(60).executed
    exact = not isinstance(loop.scheduler, SCHEDULERS["temporal_ensembling"])
    np.testing.assert_allclose(
        np.reshape(executed, (-1, 3)), course[: len(executed)], atol=0 if exact else 1e-12
    )


def test_ensembling_is_that_of_act():
    generator, chunk_size, steps = np.random.default_rng(0), 5, 20
    chunks = generator.normal(size=(steps, chunk_size, 2))
    scheduler = make_scheduler("temporal_ensembling", chunk_size)
    table = np.full((steps, steps + chunk_size, 2), np.nan)  # ACT's all_time_actions
    for t in range(steps):
        scheduler.receive(scheduler.ask(t), chunks[t], t)
        table[t, t : t + chunk_size] = chunks[t]
        column = table[:, t][~np.isnan(table[:, t, 0])]
        weights = np.exp(-DECAY * np.arange(len(column)))
        expected = (column * weights[:, None]).sum(0) / weights.sum()
        np.testing.assert_allclose(scheduler.next_action(t), expected, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_to_a_query_given_up_changes_nothing(name):
    scheduler = make_scheduler(name, 4)
    query = scheduler.ask(0.0)
    assert not scheduler.wants_observation
    scheduler.abandon(query)
    assert scheduler.wants_observation
    assert scheduler.receive(query, np.ones((4, 2)), 1.0).used == 0
    late = scheduler.ask(1.0)
    scheduler.reset()
    assert scheduler.receive(late, np.ones((4, 2)), 2.0).used == 0
    assert scheduler.next_action(2.0) is None


@pytest.mark.parametrize("name", NAMES)
def test_what_is_handed_out_and_in_is_not_shared(name):
    scheduler, chunk = make_scheduler(name, 2), np.ones((2, 1))
    scheduler.receive(scheduler.ask(0.0), chunk, 0.0)
    chunk[:] = 7
    scheduler.next_action(0.0)[:] = 9
    assert scheduler.next_action(0.0) == 1


def test_misuse_is_refused():
    scheduler = make_scheduler("execute_all", 4)
    query = scheduler.ask(1.0)
    with pytest.raises(ValueError, match="under way"):
        scheduler.ask(1.0)
    with pytest.raises(ValueError, match="clock went back"):
        scheduler.next_action(0.9)
    with pytest.raises(ValueError, match="clock went back"):
        scheduler.next_action(math.nan)
    for chunk in (np.zeros(4), np.zeros((0, 7)), np.array([[1.0], [np.nan]])):
        with pytest.raises(ValueError, match="the policy returned"):
            scheduler.receive(query, chunk, 1.0)
    assert not scheduler.wants_observation  # a refused answer leaves the query to be abandoned


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("real-time", 8), "no chunk scheduler 'real-time'. Did you mean 'real_time'?"),
        (("real_time", 8, 9), "cannot execute 9 actions per query: the policy predicts 8"),
        (("execute_all", 8, 0), "cannot execute 0 actions"),
    ],
)
def test_bad_names_and_numbers_are_explained(arguments, sentence):
    with pytest.raises(UserError, match=sentence.replace("?", r"\?")):
        make_scheduler(*arguments)

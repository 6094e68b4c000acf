"""The life of an arm: silence, nonsense and faults, on an arm of two joints with the test's clock."""

import contextlib
import math
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.errors import UserError
from vla.robot_drivers import (
    BusCorrupt,
    BusTimeout,
    Disconnected,
    DriverFault,
    DriverInfo,
    Joint,
    LimitViolation,
    Mode,
    ModeError,
    ServoFault,
    State,
    Supervisor,
    SupervisorConfig,
)

DT = 0.01
INFO = DriverInfo("arm", (Joint("a", -1, 1, 2, 10), Joint("b", 0, 2, 1, 5)), 100, "falls")
REST = np.array([0.0, 0.1])
UP = {"a": 0.5, "b": 1.0}


class Arm:
    """Goes where it is told at once; every call is written down; `fails` is raised by what it names."""

    def __init__(self, info: DriverInfo = INFO):
        self.info, self.now = info, 0.0
        self.q = np.array([0.2, 0.5])
        self.enabled, self.faults = [False, False], ()
        self.calls: list[str] = []
        self.sent: list[tuple[float, np.ndarray]] = []
        self.fails: dict[str, DriverFault] = {}
        self.stuck: int | None = None  # a joint that does not move

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise self.fails[name]

    def open(self):
        self._call("open")

    def enable(self):
        self._call("enable")
        self.enabled = [True, True]

    def read(self):
        self._call("read")
        return State(self.now, 0, self.q.copy(), tuple(self.enabled), faults=self.faults)

    def write(self, q, dq=None):
        self._call("write")
        self.sent.append((self.now, q.copy()))
        free = np.arange(len(q)) != (-1 if self.stuck is None else self.stuck)
        self.q = np.where(self.enabled & free, q, self.q)

    def hold(self):
        self._call("hold")

    def disable(self):
        self.calls.append("disable")
        self.enabled = [False, False]
        return []

    def clear_faults(self):
        self._call("clear_faults")

    def close(self):
        self.calls.append("close")


class Bench:
    """A supervised arm and its clock."""

    def __init__(self, enabled: bool = True, info: DriverInfo = INFO):
        self.arm = Arm(info)
        self.it = Supervisor(self.arm, REST)
        if enabled:
            self.it.open()
            self.it.enable(0.0)

    def run(self, seconds: float, setpoint=None):
        for _ in range(round(seconds / DT)):
            self.arm.now += DT
            if setpoint is not None:
                self.it.setpoint(setpoint, self.arm.now)
            cycle = self.it.cycle(self.arm.now)
        return cycle


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_setpoints_are_tracked(bench):
    assert bench.it.mode is Mode.HOLD
    cycle = bench.run(2.0, UP)
    assert cycle.mode is Mode.TRACK and cycle.asked == UP and not cycle.interventions
    assert np.allclose(bench.arm.q, [0.5, 1.0]) and np.allclose(cycle.sent, [0.5, 1.0])


def steer(bench: Bench, path, seconds: float, period: float, within: float) -> np.ndarray:
    """Post `path` (of time) every `period` s, due `within` seconds; return what joint a was sent."""
    due = 0.0
    for _ in range(round(seconds / DT)):
        bench.arm.now += DT
        if bench.arm.now >= due - 1e-9:
            bench.it.setpoint(UP | {"a": path(bench.arm.now)}, bench.arm.now, within)
            due += period
        bench.it.cycle(bench.arm.now)
    return np.array([q[0] for _, q in bench.arm.sent])


def test_a_setpoint_is_reached_when_it_is_due_and_on_a_straight_line():
    bench = Bench()
    bench.run(2.0, UP)  # a stands at 0.5
    sent = steer(bench, lambda t: 0.5 - 0.06 * (t - 1.96), 0.2, 0.05, within=0.05)[-20:]
    assert sent == pytest.approx(0.5 - 0.06 * DT * np.arange(20), abs=2e-4)  # a period of 0.05 s behind
    assert np.diff(sent[1:]) == pytest.approx(-0.06 * DT, abs=1e-9)
    bench.it.setpoint(UP | {"a": 0.6}, bench.arm.now, within=60.0)
    assert bench.run(0.2).mode is Mode.TRACK and bench.arm.q[0] > 0.55  # due while it is followed, 0.25 s
    assert bench.run(0.1).mode is Mode.HOLD


def test_a_policy_that_gives_its_period_moves_the_arm_evenly():
    """Steps are set off for and braked for one by one, at the highest acceleration; that helps nobody."""

    def path(t: float) -> float:
        return 0.2 + 0.35 * math.sin(0.5 * math.pi * t)

    def unrest(within: float) -> tuple[float, float]:
        """Root mean square of the acceleration sent (rad/s²), and of the way (rad) from where it is due."""
        sent = steer(Bench(), path, 8.0, 0.05, within)
        due = np.array([path(DT * k - 0.05) for k in range(1, len(sent) + 1)])
        return np.std(np.diff(sent, 2)[100:] / DT**2), np.std((sent - due)[100:])

    (even, near), (steps, far) = unrest(0.05), unrest(0.0)
    assert even < 0.2 * steps and near < 0.5 * far
    assert even == pytest.approx(0.35 * (0.5 * math.pi) ** 2 / math.sqrt(2), rel=1.5)  # of the path itself


def test_what_is_no_setpoint_is_refused_on_the_way_too():
    bench = Bench()
    bench.run(1.0, UP)
    bench.it.setpoint(UP | {"a": math.nan}, bench.arm.now, within=0.1)
    cycle = bench.run(DT)
    assert cycle.mode is Mode.HOLD and "'a'" in cycle.interventions["setpoint"]


def test_a_silent_policy_makes_the_arm_hold_and_then_rest(bench):
    bench.run(0.3, {"a": 0.9, "b": 1.8})
    assert bench.run(0.24).mode is Mode.TRACK
    cycle = bench.run(0.03)
    assert cycle.mode is Mode.HOLD and cycle.asked is None
    bench.run(0.5)
    held = bench.arm.q
    bench.run(1.0)
    assert np.array_equal(bench.arm.q, held)
    assert bench.run(1.5).mode is Mode.REST and not bench.it.at_rest
    speeds = np.diff([q for _, q in bench.arm.sent[-100:]], axis=0) / DT
    assert np.abs(speeds).max() <= 0.3 * 2 + 0.1  # unhurried
    bench.run(6.0)
    assert bench.it.at_rest and np.allclose(bench.arm.q, REST)
    assert bench.run(0.1, UP).mode is Mode.REST  # a policy that comes back finds the arm asleep
    bench.it.hold()
    assert bench.run(0.1, UP).mode is Mode.TRACK


def test_without_a_policy_an_enabled_arm_holds_for_as_long_as_it_takes(bench):
    assert bench.run(20.0).mode is Mode.HOLD


def test_a_policy_of_nonsense_is_as_good_as_a_silent_one(bench):
    bench.run(0.3, UP)
    cycle = bench.run(0.5, {"a": math.nan, "b": 1.0})
    assert cycle.mode is Mode.HOLD and "not finite" in cycle.interventions["setpoint"]
    assert bench.run(3.0, {"elbow": 1.0}).mode is Mode.REST


def test_setpoints_out_of_order_and_from_the_future_do_not_count(bench):
    bench.run(1.0, UP)
    bench.it.setpoint({"a": -0.9, "b": 0.2}, bench.arm.now - 0.1)
    assert bench.run(DT).asked == UP
    for stamp in (bench.arm.now + 1e6, math.nan):
        bench.it.setpoint({"a": -0.9, "b": 0.2}, stamp)
        bench.run(DT)
        assert bench.run(0.1, UP).asked == UP


@pytest.mark.parametrize("conditions", [["overload"], ["overheating"], ["voltage"]])
def test_a_servo_fault_brakes_holds_and_latches(bench, conditions):
    bench.run(0.2, UP)
    bench.arm.faults = (ServoFault("b", conditions),)
    cycle = bench.run(DT, UP)
    assert cycle.mode is Mode.FAULT and cycle.fault.joint == "b"
    bench.run(1.0, UP)
    writes = len(bench.arm.sent)
    bench.arm.faults = ()  # the complaint goes, the latch stays
    assert bench.run(1.0, UP).mode is Mode.FAULT
    assert len(bench.arm.sent) == writes  # it stands and is not commanded
    assert "disable" not in bench.arm.calls  # and nobody let it fall
    with pytest.raises(ModeError, match="arm' is fault: hold is possible only in mode hold, rest, track"):
        bench.it.hold()
    bench.it.reset()
    assert bench.it.mode is Mode.OPEN and bench.it.fault is None
    bench.it.enable(bench.arm.now)
    assert bench.run(0.1, UP).mode is Mode.TRACK
    assert bench.arm.calls.count("enable") == 2


def test_a_fault_that_persists_cannot_be_reset(bench):
    bench.arm.faults = (ServoFault("a", ["overheating"]),)
    bench.run(DT)
    with pytest.raises(ServoFault):
        bench.it.reset()
    assert bench.it.mode is Mode.FAULT


def test_a_joint_that_lets_go_is_a_fault(bench):
    """A supply dip: the servos come back without torque and answer as if nothing had happened."""
    bench.run(0.5, UP)
    bench.arm.enabled[1] = False
    cycle = bench.run(DT, UP)
    assert cycle.mode is Mode.FAULT and "Joint 'b' reports lost torque" in str(cycle.fault)


def test_a_joint_that_does_not_follow_is_a_fault_and_a_gripper_that_holds_something_is_not():
    hand = (INFO.joints[0], replace(INFO.joints[1], kind="gripper"))
    for joints, expected in ((INFO.joints, Mode.FAULT), (hand, Mode.TRACK)):
        bench = Bench(info=DriverInfo("arm", joints, 100, "falls"))
        bench.arm.stuck = 1
        assert bench.run(2.9, UP).mode is Mode.TRACK
        cycle = bench.run(0.5, UP)
        assert cycle.mode is expected
        if expected is Mode.FAULT:
            assert cycle.fault.joint == "b" and "no motion towards its goal" in str(cycle.fault)


@pytest.mark.parametrize(("replies", "seconds"), [(4, 0.0), (1, 0.2)])
def test_lost_replies_while_the_arm_stands_are_no_failure(replies, seconds):
    """Some in a row, or as many as there are in 0.2 s: a busy computer at the other end."""
    bench = Bench(enabled=False)
    read, until = bench.arm.read, time.monotonic() + seconds

    def sometimes():
        if len(bench.arm.calls) <= replies or time.monotonic() < until:
            bench.arm.calls.append("nothing")
            raise BusTimeout(["a"], "silent")
        return read()

    bench.arm.read = sometimes
    bench.it.open()
    assert bench.it.mode is Mode.OPEN and bench.arm.calls.count("nothing") >= replies


@pytest.mark.parametrize("fault", [BusTimeout(["b"], "silent"), BusCorrupt(["b"], "noise")])
def test_a_lost_reply_is_forgiven_half_a_second_of_them_is_not(bench, fault):
    bench.run(0.5, UP)
    bench.arm.fails["read"] = fault
    cycle = bench.run(DT, UP)
    assert cycle.mode is Mode.TRACK and not cycle.fresh
    del bench.arm.fails["read"]
    assert bench.run(0.05, UP).fresh
    bench.arm.fails["read"] = fault
    assert bench.run(0.2, UP).asked is None  # no motion on old measurements
    assert bench.run(0.25, UP).mode is not Mode.LOST
    assert bench.run(0.1, UP).mode is Mode.LOST
    writes = len(bench.arm.sent)
    bench.run(1.0, UP)
    assert len(bench.arm.sent) == writes
    with pytest.raises(type(fault)):
        bench.it.reset()
    assert bench.it.mode is Mode.LOST
    del bench.arm.fails["read"]
    bench.it.reset()
    assert bench.it.mode is Mode.OPEN and bench.arm.calls[-4:] == ["close", "open", "clear_faults", "read"]


def test_a_pause_of_the_owner_is_not_a_lost_arm(bench):
    bench.run(0.5, UP)
    bench.arm.now += 5.0
    bench.arm.fails["read"] = BusTimeout(["a"], "silent")
    assert bench.run(DT, UP).mode is not Mode.LOST


@pytest.mark.parametrize("call", ["read", "write"])
def test_a_vanished_adapter_is_lost_at_once(bench, call):
    bench.run(0.5, UP)
    bench.arm.fails[call] = Disconnected("gone")
    cycle = bench.run(DT, UP)
    assert cycle.mode is Mode.LOST and cycle.sent is None and isinstance(cycle.fault, Disconnected)


def test_an_arm_that_falls_is_released_at_rest_only(bench):
    bench.run(1.0, UP)
    with pytest.raises(ModeError, match="would fall"):
        bench.it.release()
    bench.it.rest(bench.arm.now)
    bench.run(6.0)
    assert bench.it.release() == [] and bench.arm.enabled == [False, False] and bench.it.mode is Mode.OPEN


def test_the_emergency_stop_releases_anywhere_and_other_arms_release_where_they_are(bench):
    bench.run(1.0, UP)
    bench.it.emergency_stop()
    assert bench.arm.enabled == [False, False] and bench.it.mode is Mode.OPEN
    braked = Bench(info=DriverInfo("arm", INFO.joints, 100, "brakes"))
    braked.run(1.0, UP)
    assert braked.it.release() == []


def test_an_emergency_stop_does_not_unlatch_a_fault(bench):
    bench.arm.faults = (ServoFault("a", ["overload"]),)
    bench.run(DT)
    bench.it.emergency_stop()
    assert bench.it.mode is Mode.FAULT and bench.arm.enabled == [False, False]
    with pytest.raises(ModeError):
        bench.it.enable(bench.arm.now)


def test_nothing_is_energised_that_is_faulty_or_out_of_limits():
    bench = Bench(enabled=False)
    bench.it.open()
    bench.arm.q = np.array([0.2, 2.5])
    with pytest.raises(LimitViolation):
        bench.it.enable(0.0)
    bench.arm.q, bench.arm.faults = np.array([0.2, 0.5]), (ServoFault("a", ["voltage"]),)
    with pytest.raises(ServoFault):
        bench.it.enable(0.0)
    assert "enable" not in bench.arm.calls and bench.it.mode is Mode.OPEN


@pytest.mark.parametrize("was_on", [False, True])
def test_an_enable_that_fails_halfway_leaves_the_arm_as_it_was(was_on):
    bench = Bench(enabled=False)
    bench.arm.enabled = [was_on, was_on]
    bench.it.open()
    bench.arm.fails["enable"] = BusTimeout(["b"], "silent")
    with pytest.raises(BusTimeout):
        bench.it.enable(0.0)
    assert ("disable" in bench.arm.calls) is not was_on


def test_a_failed_open_gives_the_port_back():
    bench = Bench(enabled=False)
    bench.arm.fails["open"] = Disconnected("no port")
    with pytest.raises(Disconnected):
        bench.it.open()
    assert bench.arm.calls == ["open", "close"] and bench.it.mode is Mode.OFF
    with pytest.raises(ModeError, match="is off: cycle is possible only"):
        bench.it.cycle(0.0)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(UserError, match="rest pose"):
        Supervisor(Arm(), np.array([0.0, -1.0]))
    with pytest.raises(UserError, match="rest pose"):
        Supervisor(Arm(), np.array([0.0, math.nan]))
    with pytest.raises(UserError, match="stale_hold"):
        SupervisorConfig(stale_hold=5.0)


NUMBERS = st.one_of(st.floats(-5, 5), st.sampled_from([math.nan, math.inf, None, 1e300]))
EVENTS = st.one_of(
    st.tuples(st.just("setpoint"), st.fixed_dictionaries({"a": NUMBERS, "b": NUMBERS}), st.floats(-1, 1)),
    st.tuples(st.just("wait"), st.sampled_from([0.001, 0.01, 0.011, 0.03, 0.3, 4.0])),
    st.tuples(
        st.just("fail"), st.sampled_from(["read", "write"]), st.sampled_from([BusTimeout, Disconnected])
    ),
    st.tuples(st.just("fault")),
    st.tuples(st.just("well")),
    st.tuples(st.sampled_from(["rest", "hold", "release", "emergency_stop", "reset", "enable"])),
)


@settings(max_examples=150)
@given(st.lists(EVENTS, max_size=60))
def test_no_course_of_events_breaks_a_bound_or_a_latch(events):
    bench = Bench()
    for event in events:
        latched = bench.it.mode in (Mode.FAULT, Mode.LOST)
        happen(bench, *event)
        bench.arm.now += DT
        cycle = bench.it.cycle(bench.arm.now)
        if latched and event[0] != "reset":
            assert cycle.mode in (Mode.FAULT, Mode.LOST)
        if cycle.mode in (Mode.OPEN, Mode.LOST):
            assert cycle.sent is None
    sent = bench.arm.sent
    for (t0, q0), (t1, q1) in pairwise(sent):
        assert ((q1 >= INFO.lower) & (q1 <= INFO.upper)).all()
        assert (np.abs(q1 - q0) <= INFO.velocity * (t1 - t0) + 1e-9).all()


def happen(bench: Bench, what: str, *arguments) -> None:
    arm, it = bench.arm, bench.it
    match what:
        case "setpoint":
            it.setpoint(arguments[0], arm.now + arguments[1])
        case "wait":
            arm.now += arguments[0]
        case "fail":
            kind = arguments[1]
            arm.fails[arguments[0]] = kind("gone") if kind is Disconnected else kind(["a"], "silent")
        case "fault":
            arm.faults = (ServoFault("a", ["overload"]),)
        case "well":
            arm.fails, arm.faults = {}, ()
        case _:
            with contextlib.suppress(ModeError, DriverFault):
                getattr(it, what)(*([arm.now] if what in ("rest", "enable") else []))

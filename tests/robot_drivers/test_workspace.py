"""The gripper's box: kinematics against MuJoCo, the braking bound, and no input that gets a command out."""

import copy
import itertools
import math
import time

import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.errors import UserError
from vla.robot_drivers import Arm, ArmConfig, DriverInfo, Joint, Mode, SafetyFilter, read_record
from vla.robot_drivers.emulation import Emulator
from vla.robot_drivers.safety_filter import LONGEST_STEP
from vla.robot_drivers.so101.calibration import JOINTS, JointCalibration
from vla.robot_drivers.so101.driver import make_so101, so101_info
from vla.robot_drivers.supervisor import SupervisorConfig
from vla.robot_drivers.workspace import MODELS, Workspace

CALIBRATION = {name: JointCalibration(id, 0, 0, 1000, 3000) for id, name in enumerate(JOINTS, 1)}
INFO = so101_info(CALIBRATION)
SPAN = INFO.upper - INFO.lower
WIDE = (-1.0, 1.0, -1.0, 1.0, -1.0, 1.0)
EVERYWHERE = Workspace(WIDE, INFO)
KINEMATICS = EVERYWHERE.kinematics
REFERENCE = mujoco.MjModel.from_xml_path(str(MODELS["so101"][0]))
DATA = mujoco.MjData(REFERENCE)

SHARES = st.tuples(*[st.floats(0.0, 1.0)] * 6).map(np.array)
STRANGE = st.sampled_from([math.nan, math.inf, -math.inf, 1e308, None, "fast"])


def box(bounds) -> Workspace:
    """The workspace with these bounds, without reading the model again."""
    workspace = copy.copy(EVERYWHERE)
    workspace.lower, workspace.upper = np.array(bounds[::2], float), np.array(bounds[1::2], float)
    return workspace


def position(q) -> np.ndarray:
    """Where MuJoCo's whole pipeline puts the frame, (3,); the jaw is somewhere."""
    for name, value in zip(JOINTS, q, strict=True):
        DATA.joint(name).qpos[0] = value
    mujoco.mj_forward(REFERENCE, DATA)
    return DATA.site("grasp").xpos.copy()


def distance(q, bounds) -> float:
    low, high = np.array(bounds[::2]), np.array(bounds[1::2])
    x = position(q)
    return float(np.linalg.norm(np.maximum(np.maximum(low - x, x - high), 0.0)))


@settings(max_examples=30)
@given(SHARES)
def test_the_frame_is_where_mujoco_says_and_moves_as_differences_say(shares):
    q = INFO.lower + shares * SPAN
    x, jacobian = KINEMATICS(q)
    assert x == pytest.approx(position(q), abs=1e-12)
    for j in range(6):
        step = np.zeros(6)
        step[j] = 1e-6
        moved = (position(q + step) - position(q - step)) / 2e-6 if j < 5 else np.zeros(3)
        assert jacobian[:, j] == pytest.approx(moved, abs=1e-7)


def test_the_arm_stretched_out_forwards_is_measured_by_hand():
    """At zero everywhere the forearm points forwards; the pan turns it about the base's axis."""
    x, _ = KINEMATICS(np.zeros(6))
    assert x[0] > 0.3 and abs(x[1]) < 0.02 and x[2] > 0.1  # in front, in the middle, above the table
    axis = np.array([0.0388353, 0.0])  # the pan's axis in the base's plane, from the model
    for pan in (-1.0, 0.5, 1.2):
        turned, _ = KINEMATICS(np.array([pan, 0, 0, 0, 0, 0.5]))
        assert np.linalg.norm(turned[:2] - axis) == pytest.approx(np.linalg.norm(x[:2] - axis), abs=1e-9)
        assert turned[2] == pytest.approx(x[2], abs=1e-9)
    assert KINEMATICS.distances[5] == 0 and (np.diff(KINEMATICS.distances) < 0).all()


BOXES = st.tuples(
    st.floats(0.0, 0.15),
    st.floats(0.3, 0.5),
    st.floats(-0.3, -0.05),
    st.floats(0.05, 0.3),
    st.floats(0.0, 0.1),
    st.floats(0.2, 0.4),
)


@settings(max_examples=60)
@given(SHARES, st.tuples(*[st.floats(-2, 2)] * 6).map(np.array), st.lists(SHARES, min_size=1, max_size=6))
def test_what_braking_can_touch_is_bounded(shares, v, parts):
    """The tightest box that the certificate accepts holds every point between here and standstill."""
    q = INFO.lower + shares * SPAN
    x, _ = KINEMATICS(q)
    for axis in range(3):
        for side in (0, 1):
            bounds = np.array([-9.0, 9.0] * 3)
            near, far = 0.0, 2.0
            for _ in range(12):
                middle = (near + far) / 2
                bounds[2 * axis + side] = x[axis] + (middle if side else -middle)
                near, far = (near, middle) if box(bounds).holds_braking(q, v) else (middle, far)
            for part in parts:
                reached = position(q + part * v * np.abs(v) / (2 * INFO.acceleration))[axis] - x[axis]
                assert (reached if side else -reached) <= far + 1e-12


SETPOINTS = st.one_of(
    st.none(),
    SHARES.map(lambda it: dict(zip(JOINTS, (INFO.lower + (1.4 * it - 0.2) * SPAN).tolist(), strict=True))),
    st.dictionaries(st.sampled_from(JOINTS), st.one_of(st.floats(-3, 3), STRANGE), min_size=5, max_size=6),
)
INTERVALS = st.one_of(st.floats(0.002, 0.05), st.sampled_from([0.0, -1.0, 1e-12, 0.3, 5.0, math.nan]))
CALLS = st.lists(st.tuples(INTERVALS, SETPOINTS, st.integers(1, 15)), min_size=1, max_size=8)


def run(filter, start, calls) -> list[tuple[float, np.ndarray]]:
    """Return what is sent and when, if every setpoint is asked for so many times in a row."""
    state, now = filter.start(0.0, start), 0.0
    sent = [(0.0, state.q)]
    for interval, setpoint, times in calls:
        for _ in range(times):
            before = state
            state, _ = filter.step(state, now + interval, setpoint, state.q)
            now = max(now, now + interval) if math.isfinite(interval) else now
            if state.time != before.time:
                sent.append((state.time, state.q))
    return sent


@settings(max_examples=100)
@given(BOXES, SHARES, CALLS)
def test_no_sequence_of_inputs_sends_the_gripper_out_of_its_box(bounds, shares, calls):
    """Neither in position nor, for one that began inside, at the cost of the acceleration's bound."""
    sent = run(SafetyFilter(INFO, workspace=box(bounds)), INFO.lower + shares * SPAN, calls)
    outside = [distance(q, bounds) for _, q in sent]
    for before, after in itertools.pairwise(outside):
        assert after <= before + 1e-12  # 0 stays 0, and from outside it only comes nearer
    check_motion(sent, gently=outside[0] == 0)


def check_motion(sent: list[tuple[float, np.ndarray]], gently: bool) -> None:
    """Limits and velocities hold, and accelerations if the motion is to be gentle."""
    velocity = np.zeros(6)
    for (t0, q0), (t1, q1) in itertools.pairwise(sent):
        assert (q1 >= INFO.lower).all() and (q1 <= INFO.upper).all()
        stalled = t1 - t0 > LONGEST_STEP
        new = (q1 - q0) / (LONGEST_STEP if stalled else t1 - t0)
        assert (np.abs(new) <= INFO.velocity * (1 + 1e-7)).all()
        change = np.abs(new - (0 if stalled else velocity))
        bound = INFO.acceleration * min(t1 - t0, LONGEST_STEP)
        assert not gently or (change <= bound * (1 + 1e-7) + 1e-8).all()
        velocity = new


@settings(max_examples=60)
@given(st.lists(SHARES, min_size=1, max_size=3), st.floats(0.02, 0.1), st.sampled_from([0.005, 0.01, 0.03]))
def test_a_run_into_a_wall_is_braked_before_it(wishes, size, dt):
    """Sweeps of all joints through a small box, at full speed where there is room for it."""
    x = KINEMATICS(HOME)[0]
    bounds = np.stack([x - size, x + size], axis=1).ravel()
    calls = [(dt, named(INFO.lower + wish * SPAN), int(0.5 / dt)) for wish in wishes]
    sent = run(SafetyFilter(INFO, workspace=box(bounds), following_error=10), HOME, calls)
    assert max(distance(q, bounds) for _, q in sent) == 0
    check_motion(sent, gently=True)


def named(q) -> dict[str, float]:
    return dict(zip(JOINTS, np.asarray(q, float).tolist(), strict=True))


HOME = np.array([0.0, -0.3, 0.4, 0.6, 0.0, 0.5])


def walls(**changes: float) -> tuple[float, ...]:
    x, y, z = KINEMATICS(HOME)[0]
    box = {"x0": x - 0.2, "x1": x + 0.2, "y0": y - 0.2, "y1": y + 0.2, "z0": z - 0.2, "z1": z + 0.2}
    return tuple((box | changes).values())


def test_far_from_the_walls_nothing_changes():
    goal = HOME + np.array([0.2, 0.1, -0.1, 0.1, 1.0, 0.2])
    calls = [(0.01, named(goal), 150)]
    with_box = run(SafetyFilter(INFO, workspace=box(WIDE)), HOME, calls)
    without = run(SafetyFilter(INFO), HOME, calls)
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(with_box, without, strict=True))
    assert np.abs(with_box[-1][1] - goal).max() < 1e-6


def test_a_setpoint_behind_a_wall_is_followed_along_the_wall():
    """The wall is 20 mm in front; the arm is asked to go far beyond it, and to turn."""
    front = float(KINEMATICS(HOME)[0][0] + 0.02)
    filter = SafetyFilter(INFO, workspace=box(walls(x1=front)))
    beyond = HOME + np.array([0.0, 0.5, -0.4, 0.0, 0.0, 0.0])
    assert position(beyond)[0] > front + 0.02
    there = run(filter, HOME, [(0.01, named(beyond), 400)])[-1][1]
    assert front - 0.006 < position(there)[0] <= front
    state = filter.start(0.0, there)
    for k in range(1, 400):
        turned = beyond + np.array([0.3 * min(k / 100, 1), 0, 0, 0, 0, 0])
        state, why = filter.step(state, 0.01 * k, named(turned), state.q)
        assert position(state.q)[0] <= front
    assert position(state.q)[1] - position(there)[1] > 0.05 or position(state.q)[1] < -0.05
    assert "workspace" in why.values()


def test_a_gripper_closes_while_the_arm_stops_at_a_wall():
    front = float(KINEMATICS(HOME)[0][0] + 0.02)
    with_box = SafetyFilter(INFO, workspace=box(walls(x1=front)))
    goal = HOME + np.array([0.0, 0.5, -0.4, 0.0, 0.0, -0.4])
    sent = run(with_box, HOME, [(0.01, named(goal), 60)])
    free = run(SafetyFilter(INFO), HOME, [(0.01, named(goal), 60)])
    assert [q[5] for _, q in sent] == [q[5] for _, q in free]
    assert position(sent[-1][1])[0] <= front


def test_from_outside_the_way_leads_in_and_not_back_out():
    low = float(KINEMATICS(HOME)[0][2] + 0.03)
    bounds = walls(z0=low)
    assert distance(HOME, bounds) == pytest.approx(0.03, abs=1e-9)
    filter = SafetyFilter(INFO, workspace=box(bounds))
    deeper = HOME + np.array([0, 0.3, 0, 0, 0, 0])
    assert distance(deeper, bounds) > 0.04
    up = HOME + np.array([0, -0.4, 0, 0, 0, 0])
    assert distance(up, bounds) == 0
    inside = run(filter, HOME, [(0.01, named(up), 200)])[-1][1]
    assert distance(inside, bounds) == 0 and np.abs(inside - up).max() < 1e-3
    back = run(filter, inside, [(0.01, named(HOME), 300)])
    assert max(distance(q, bounds) for _, q in back) == 0
    assert "outside" in Workspace(bounds, INFO).describe(HOME)
    assert "outside" not in Workspace(bounds, INFO).describe(inside)


def test_nonsense_is_refused_in_a_sentence():
    for bounds in ((0, 1, 0, 1), (0, 1, 0, 1, 0, math.nan)):
        with pytest.raises(UserError, match="six numbers in metres"):
            Workspace(bounds, INFO)
    with pytest.raises(UserError, match="empty or too thin along y, z"):
        Workspace((0, 1, 0.2, -0.2, 0.1, 0.1), INFO)
    other = DriverInfo("crane", (Joint("hook", 0, 1, 1, 1),), 10, "holds")
    with pytest.raises(UserError, match="no kinematic model of 'crane'"):
        Workspace(WIDE, other)


def test_an_arm_with_a_box_stays_in_it_and_still_lies_down(tmp_path):
    """Through processes and the bus: the way to rest leaves the box, what the program asks for does not."""
    content = {name: vars(it) for name, it in CALIBRATION.items()}
    up = walls(z0=float(KINEMATICS(HOME)[0][2] - 0.02))
    record = tmp_path / "run.jsonl"
    with Emulator([{"encoder": 2000.0}] * 6) as emulator:
        driver = make_so101(emulator.port, content, reply_timeout=1.0)
        driver.bus.open()
        driver.write_calibration()
        driver.close()
        for id, (name, q) in enumerate(zip(JOINTS, HOME, strict=True), 1):
            it = CALIBRATION[name]
            steps = it.from_fraction(q) if name == "gripper" else it.from_angle(q)
            emulator.set(id, encoder=float(steps))
        config = ArmConfig(
            "so101",
            {"port": emulator.port, "calibration": content, "reply_timeout": 0.2, "dead_after": 2.0},
            supervisor=SupervisorConfig(rest_speed=1.0, sample_patience=1.0, lost_after=2.0),
            workspace=up,
            record=record,
        )
        with Arm(config) as arm:
            arm.open()
            arm.enable()
            begin, tracked = time.monotonic(), 0
            while time.monotonic() - begin < 2.0 or tracked <= 20:
                arm.setpoint(named(HOME + np.array([0, 0.6, 0.3, 0, 0, 0])))  # down, through the floor
                cycle = arm.latest()
                if cycle.mode is Mode.TRACK:  # a busy machine may have let the setpoint grow stale
                    tracked, why = tracked + 1, set(cycle.interventions.values())
                time.sleep(0.02)
            assert "workspace" in why
            assert arm.close().at_rest
        assert emulator.registers("TORQUE_ENABLE") == [0] * 6
    cycles = read_record(record).cycles
    followed = [it.sent for it in cycles if it.mode.value == "track"]
    assert len(followed) > 20 and max(distance(q, up) for q in followed) < 1e-9
    lowered = [it.sent for it in cycles if it.mode.value == "rest" and it.sent is not None]
    assert distance(lowered[-1], up) > 0.02

"""Every check of the pre-flight by itself: what passes, what is a note, what fails with which remedy."""

import io
import time
from dataclasses import replace

import numpy as np
import pytest
from arm_bench import CHUNK, RATE, FakeCamera, arm_contract, raised
from rich.console import Console

from vla.errors import UserError
from vla.robot_drivers import Cycle, Disconnected, Mode, ServoFault, State
from vla.robot_drivers.cameras import Cameras
from vla.robot_drivers.so101.calibration import JOINTS, JointCalibration
from vla.robot_drivers.so101.driver import so101_info
from vla.runtime.chunk_scheduling import make_scheduler
from vla.runtime.robot import preflight
from vla.runtime.robot.preflight import Check

CALIBRATION = {name: JointCalibration(id, 0, 0, 1000, 3000) for id, name in enumerate(JOINTS, 1)}
INFO = so101_info(CALIBRATION)
CONTRACT = arm_contract(CALIBRATION)


def interface(**changes):
    return replace(CONTRACT, interface=replace(CONTRACT.interface, **changes))


def cycle(**changes):
    sample = {
        "time": 0.0,
        "sequence": 1,
        "q": raised(INFO),
        "enabled": (False,) * 6,
        "temperature": np.full(6, 31.0),
        "voltage": np.full(6, 7.4),
    }
    return Cycle(0.0, Mode.OPEN, None, None, State(**sample | changes), True)


def test_only_joint_positions_are_run():
    assert preflight.check_action_space(CONTRACT).verdict == "ok"
    for space in ("osc_pose_delta", None):
        check = preflight.check_action_space(interface(action_space=space))
        assert check.verdict == "fails" and "--action-space joint_position" in check.remedy


@pytest.mark.parametrize(
    ("arguments", "verdict", "words"),
    [
        ((cycle(), None), "ok", "answers, calibrated, 7.4 V, 31 °C"),
        ((cycle(voltage=None, temperature=None), None), "ok", "answers, calibrated"),
        ((None, Disconnected("The adapter is gone.")), "fails", "The adapter is gone."),
        ((None, None), "fails", "It gave no sample."),
        ((cycle(temperature=np.array([31.0] * 5 + [64])), None), "fails", "Let it cool down"),
        (
            (cycle(faults=(ServoFault("gripper", ["overload"], "Free it."),)), None),
            "fails",
            "overload. Free it",
        ),
    ],
)
def test_the_arm_must_answer_cool_and_without_complaint(arguments, verdict, words):
    check = preflight.check_arm(*arguments)
    assert check.verdict == verdict and words in check.found + check.remedy


def test_joints_units_and_ranges():
    verdicts = [check.verdict for check in preflight.check_joints(CONTRACT, INFO, None)]
    assert verdicts == ["ok", "ok"]
    assert preflight.check_joints(CONTRACT, None, None)[0].verdict == "fails"
    silent = interface(
        action=replace(CONTRACT.interface.action, units=()),
        state=replace(CONTRACT.interface.state, units=()),
    )
    (check,) = preflight.check_joints(silent, INFO, None)
    assert check.verdict == "fails" and "--joint-units" in check.remedy
    assert [it.verdict for it in preflight.check_joints(silent, INFO, "lerobot-degrees")] == ["ok", "ok"]
    named, ranges = preflight.check_joints(silent, INFO, "si")  # degrees taken for radians
    assert named.verdict == "ok" and ranges.verdict == "fails"
    assert "shoulder_lift" in ranges.found and "--joint-units" in ranges.remedy
    other = interface(action=replace(CONTRACT.interface.action, names=("a", "b", "c", "d", "e", "f")))
    (check,) = preflight.check_joints(other, INFO, None)
    assert check.verdict == "fails" and "each joint is needed once" in check.remedy
    unknown = replace(CONTRACT, statistics={})
    assert preflight.check_joints(unknown, INFO, None)[1].verdict == "note"


def test_an_action_may_go_beyond_the_limits_by_a_twentieth_of_the_range():
    span = np.degrees(INFO.upper[0] - INFO.lower[0])
    for beyond, verdict in ((0.04, "ok"), (0.06, "fails")):
        action = {key: list(value) for key, value in CONTRACT.statistics["action"].items()}
        action["max"][0] = float(np.degrees(INFO.upper[0]) + beyond * span)
        joints = preflight.map_joints(CONTRACT, INFO, None)
        contract = replace(CONTRACT, statistics={"action": action})
        assert preflight.check_ranges(contract, INFO, joints.action).verdict == verdict


@pytest.mark.parametrize(
    ("rate", "words"),
    [(30.0, None), (100.0, None), (101.0, "the arm does 100"), (5.0, "--supervisor.stale-hold")],
)
def test_the_rate_must_suit_the_arm(rate, words):
    check = preflight.check_rate(interface(control_rate=rate), INFO, 0.25)
    assert check.verdict == ("ok" if words is None else "fails")
    assert words is None or words in check.found + check.remedy
    assert preflight.check_rate(CONTRACT, None, 0.25).verdict == "ok"


class SlowCamera(FakeCamera):
    def read(self):
        time.sleep(0.2)
        return super().read()


def test_cameras_are_held_to_the_contract_one_by_one():
    silent = FakeCamera()
    silent.stuck = True
    with Cameras({"top": FakeCamera(), "wrist": FakeCamera(32, 32), "spare": FakeCamera()}) as cameras:
        top, wrist, spare = preflight.check_cameras(CONTRACT, cameras, 20.0)
    assert spare.verdict == "fails" and "as the policy does: top, wrist" in spare.remedy
    assert top.verdict == "ok" and top.found.startswith("64x48, ")
    assert wrist.verdict == "fails" and wrist.found == "gives 32x32" and "trained on 64x48" in wrist.remedy
    with Cameras({"top": silent}) as cameras:
        top, wrist = preflight.check_cameras(CONTRACT, cameras, 0.2)
        silent.stuck = False
    assert top.verdict == "fails" and "no picture" in top.found
    assert wrist.found == "not given (given: top)" and wrist.remedy.endswith("--cameras wrist=0")
    with Cameras({"top": SlowCamera(), "wrist": SlowCamera()}) as cameras:
        top, _ = preflight.check_cameras(CONTRACT, cameras, 20.0)
    assert top.verdict == "note" and "slower than the policy's 20 Hz" in top.found


class TimedPolicy:
    """Answers with `value` in every entry, after a while the first time; or raises."""

    def __init__(self, value=0.0, error=None):
        self.value, self.error, self.asked = value, error, 0

    def act(self, images, state, instruction):
        self.asked += 1
        assert state.shape == (6,) and images["observation.images.top"].shape == (48, 64, 3)
        if self.error:
            raise self.error
        if self.asked == 1:
            time.sleep(1.0)  # warming up does not count: it would fail
        return np.full((CHUNK, 6), self.value)


@pytest.mark.parametrize(
    ("policy", "scheduler", "verdict", "words"),
    [
        (TimedPolicy(), "real_time", "ok", "answers in"),
        (TimedPolicy(), "execute_all", "note", "will wait for it"),
        (TimedPolicy(value=np.nan), "real_time", "fails", "not finite"),
        (TimedPolicy(error=UserError("Sent a cat.")), "real_time", "fails", "Sent a cat."),
    ],
)
def test_the_policy_is_asked_and_timed(policy, scheduler, verdict, words):
    assert RATE == 20.0
    joints = preflight.map_joints(CONTRACT, INFO, None)
    with Cameras({"top": FakeCamera(), "wrist": FakeCamera()}) as cameras:
        cameras.wait_for_first(20.0)
        check = preflight.check_policy(
            CONTRACT, policy, cycle(), cameras, joints, make_scheduler(scheduler, CHUNK), "wave"
        )
    assert check.verdict == verdict and words in check.found + check.remedy


@pytest.mark.parametrize(
    ("seconds", "verdict", "words"),
    [
        (0.39, "ok", "answers in 390 ms"),
        (
            0.41,
            "note",
            "will wait for it",
        ),  # the half of the chunk that is left when it is asked lasts 400 ms
        (0.81, "fails", "A chunk of 16 actions lasts 800 ms"),
    ],
)
def test_an_answer_must_come_before_its_actions_are_due(seconds, verdict, words):
    check = preflight._check_latency(seconds, CONTRACT, make_scheduler("real_time", CHUNK))
    assert check.verdict == verdict and words in check.found + check.remedy


def test_a_policy_is_not_asked_about_what_is_not_there():
    policy = TimedPolicy()
    joints = preflight.map_joints(CONTRACT, INFO, None)
    scheduler = make_scheduler("real_time", CHUNK)
    with Cameras({"top": FakeCamera()}) as cameras:
        for given in ((cycle(), joints), (None, joints), (cycle(), None)):
            check = preflight.check_policy(CONTRACT, policy, given[0], cameras, given[1], scheduler, "wave")
            assert check.verdict == "fails" and policy.asked == 0


def test_the_table_shows_everything_and_failing_items_are_named():
    checks = [
        Check("arm", "ok", "answers"),
        Check("camera top", "note", "30 Hz"),
        Check("policy", "fails", "['a', 'b']", "Say [which]."),
        Check("control rate", "fails", "400 Hz", "Slower."),
    ]
    console = Console(file=io.StringIO(), width=100)
    console.print(preflight.table(checks))
    shown = console.file.getvalue()
    for check in checks:
        for words in (check.item, check.verdict, check.found, check.remedy):
            assert words in shown
    with pytest.raises(UserError, match="Not started, nothing has moved: policy, control rate;"):
        preflight.require(checks)
    preflight.require(checks[:2])

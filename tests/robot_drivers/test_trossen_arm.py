"""An arm of another make: the makers' unmodified driver of the WidowX AI against a simulated controller.

Process, filter, supervisor and recorder are those of every arm; only the driver differs.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.errors import UserError
from vla.robot_drivers import (
    Arm,
    ArmConfig,
    BusTimeout,
    Disconnected,
    LimitViolation,
    Mode,
    SupervisorConfig,
    read_record,
)
from vla.robot_drivers.adapters.trossen import GRIPPER, LIMITS, VELOCITY, make_trossen

PATIENCE = 60.0  # s, for a loaded machine
HERE = f"127.77.{os.getpid() // 250 % 250}.{os.getpid() % 250 + 1}"  # the ports are the real controller's
NAMES = tuple(LIMITS)
GOAL = dict(zip(NAMES, (0.4, 0.6, 0.5, -0.3, 0.2, 0.4, 0.02), strict=True))


class Controller:
    """The simulated controller in its own process."""

    def __init__(self):
        program = str(Path(__file__).with_name("trossen_controller.py"))
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-P", program, HERE], stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()

    def ask(self, **request: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    @property
    def positions(self) -> np.ndarray:
        return np.array(self.ask(look=True)["positions"])

    @property
    def energised(self) -> set[bool]:
        return set(self.ask(look=True)["energised"])

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Answer nothing meanwhile, as behind a pulled cable."""
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def controller() -> Iterator[Controller]:
    controller = Controller()
    yield controller
    controller.close()


def config(**changes) -> ArmConfig:
    watchdog = SupervisorConfig(rest_speed=1.0, sample_patience=1.0, lost_after=1.5)
    return ArmConfig("trossen", {"address": HERE, "timeout": 1.0}, **{"supervisor": watchdog} | changes)


def drive(arm: Arm, goal=GOAL, near: float = 0.02) -> None:
    begin = time.monotonic()
    wanted = np.array([goal[name] for name in NAMES])
    while np.abs(arm.latest().state.q - wanted).max() > near:
        arm.setpoint(goal)
        time.sleep(0.02)
        assert time.monotonic() - begin < PATIENCE, arm.latest()


def until(done) -> None:
    begin = time.monotonic()
    while not done():
        time.sleep(0.05)
        assert time.monotonic() - begin < PATIENCE


def assert_left_at_rest(controller: Controller) -> None:
    assert controller.energised == {False}
    assert np.abs(controller.positions - 0.0).max() < 0.1  # 3 % of the widest range


def test_it_is_opened_driven_within_its_limits_and_left_at_rest(controller, tmp_path):
    record = tmp_path / "run.jsonl"
    with Arm(config(record=record)) as arm:
        cycle = arm.open()
        assert cycle.mode is Mode.OPEN and not any(cycle.state.enabled)
        assert arm.info.name == "widowx_ai" and arm.info.joint_names == NAMES
        assert cycle.state.q == pytest.approx(controller.positions, abs=1e-3)
        arm.enable()
        assert controller.energised == {True}
        drive(arm)
        assert arm.latest().state.q == pytest.approx(controller.positions, abs=0.02)
        beyond = GOAL | {"joint_2": 9.0, GRIPPER: 9.0}
        drive(arm, GOAL | {"joint_2": LIMITS["joint_2"][1] - 0.0236, GRIPPER: 0.04356}, near=0.03)
        for _ in range(50):
            arm.setpoint(beyond)
            time.sleep(0.02)
        assert arm.latest().interventions["joint_2"] == "limit"
        ending = arm.close()
    assert ending.at_rest and not ending.unreleased
    assert_left_at_rest(controller)
    run = read_record(record)
    sent = run.sent[~np.isnan(run.sent).any(axis=1)]
    info = run.info
    assert (sent >= info.lower).all() and (sent <= info.upper).all() and sent[:, 2].max() > 2.2
    times = run.times[~np.isnan(run.sent).any(axis=1)]
    speed = np.abs(np.diff(sent[:, :6], axis=0)) / np.diff(times)[:, None]
    assert speed.max() <= VELOCITY * 1.001
    assert run.cycles[-1].state.temperature is not None and run.cycles[-1].state.tau is not None


def test_an_error_of_the_controller_is_a_latched_fault_that_can_be_reset(controller):
    with Arm(config()) as arm:
        arm.open()
        arm.enable()
        drive(arm)
        controller.ask(fault="JOINT_OVERHEATED", why="joint 3 is too hot")
        until(lambda: arm.latest().mode is Mode.FAULT)
        cycle = arm.latest()
        assert "Joint overheated" in str(cycle.fault) and "joint 3 is too hot" in str(cycle.fault)
        assert not any(cycle.state.enabled) and controller.energised == {False}
        arm.reset()
        until(lambda: arm.latest().mode is Mode.OPEN)  # what it looks at next says so
        arm.enable()
        drive(arm, GOAL | {"joint_0": 0.2})
        assert arm.close().at_rest
    assert_left_at_rest(controller)


def test_an_arm_in_error_ends_braked_and_says_that_it_is_not_at_rest(controller):
    with Arm(config()) as arm:
        arm.open()
        arm.enable()
        drive(arm)
        controller.ask(fault="JOINT_DISABLED_UNEXPECTEDLY", why="")
        until(lambda: arm.latest().mode is Mode.FAULT)
        ending = arm.close()
    assert ending.at_rest is False and not ending.unreleased
    assert controller.energised == {False}


def test_a_silent_controller_is_lost_and_found_again(controller):
    """The makers' driver would give the last sample for ever."""
    with Arm(config()) as arm:
        arm.open()
        arm.enable()
        drive(arm)
        with controller.silent():
            until(lambda: arm.latest().mode is Mode.LOST)
            assert "is silent" in str(arm.latest().fault)
        arm.reset()
        arm.enable()
        drive(arm, GOAL | {"joint_0": 0.2})
        assert arm.close().at_rest
    assert_left_at_rest(controller)


def test_a_program_that_is_killed_leaves_the_arm_at_rest(controller):
    script = (
        "import json, sys, time\n"
        "from vla.robot_drivers import Arm, ArmConfig, SupervisorConfig\n"
        "content = json.loads(sys.argv[1])\n"
        "watchdog = SupervisorConfig(**content['supervisor'])\n"
        "arm = Arm(ArmConfig(**content | {'supervisor': watchdog}))\n"
        "arm.open()\n"
        "arm.enable()\n"
        "while True:\n"
        "    arm.setpoint(json.loads(sys.argv[2]))\n"
        "    time.sleep(0.02)\n"
    )
    command = [sys.executable, "-P", "-c", script, config().to_json(), json.dumps(GOAL)]
    program = subprocess.Popen(command)
    until(lambda: controller.positions[1] > 0.5)
    program.kill()
    program.wait()
    until(lambda: controller.energised == {False})
    assert_left_at_rest(controller)


def test_the_driver_alone_refuses_what_it_must(controller):
    driver = make_trossen(HERE, timeout=1.0)
    with pytest.raises(Disconnected, match="is not connected"):
        driver.read()
    driver.open()
    driver.enable()
    first, second = driver.read(), driver.read()
    assert second.sequence == first.sequence + 1 and second.time > first.time and all(second.enabled)
    for wrong in (np.full(7, np.nan), np.zeros(6), np.array([0, -0.1, 0, 0, 0, 0, 0])):
        with pytest.raises(LimitViolation, match="outside its limits"):
            driver.write(wrong)
    with controller.silent(), pytest.raises(BusTimeout, match="is silent"):
        for _ in range(1000):  # a signal takes its time, and samples may still be on their way
            driver.read()
    assert driver.disable() == [] and controller.energised == {False}
    driver.close()
    driver.close()
    with pytest.raises(Disconnected):
        driver.read()


def test_a_controller_with_narrower_limits_is_refused_until_the_driver_knows_them(controller):
    controller.ask(limit=[2, 0.0, 2.0])
    with pytest.raises(LimitViolation, match=r"'joint_2' move from 0.0000 to 2.0000 rad"):
        make_trossen(HERE, timeout=1.0).open()
    driver = make_trossen(HERE, {"joint_2": [0.0, 2.0]}, timeout=1.0)
    driver.open()
    assert driver.info.upper[2] == 2.0
    driver.close()
    with pytest.raises(UserError, match="has no joint elbow"):
        make_trossen(HERE, {"elbow": [0.0, 1.0]})


def test_nobody_there_is_a_sentence_in_time(monkeypatch):
    begin = time.monotonic()
    with pytest.raises(Disconnected, match=r"The link to 'widowx_ai' at 127.77.* is gone: Failed to connect"):
        make_trossen(HERE, timeout=0.5).open()
    assert time.monotonic() - begin < 10
    monkeypatch.setitem(sys.modules, "trossen_arm", None)
    with pytest.raises(UserError, match=r"pip install 'lerobot_policy_cogmerge\[trossen\]'"):
        make_trossen(HERE)

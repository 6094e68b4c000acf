"""The arm in a process of its own: however the program that steers it ends, the arm ends at rest.

Everything is real here but the servos: processes, signals, a serial port, the clock. Limp joints of this
world stay where they are, so a joint that is found at its rest pose was driven there before it was released.
"""

import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from port_wait import opens

from vla.errors import UserError
from vla.robot_drivers import (
    Arm,
    ArmConfig,
    ArmEnded,
    Disconnected,
    LimitViolation,
    Mode,
    ModeError,
    NotCalibrated,
    SupervisorConfig,
    read_record,
)
from vla.robot_drivers.emulation import Emulator
from vla.robot_drivers.replay import replay
from vla.robot_drivers.replay import track as track_of
from vla.robot_drivers.so101.calibration import JOINTS
from vla.robot_drivers.so101.driver import make_so101

PATIENCE = 60.0  # s, for a loaded machine
CALIBRATION = {
    name: {"id": id, "drive_mode": 0, "homing_offset": 0, "range_min": 1000, "range_max": 3000}
    for id, name in enumerate(JOINTS, 1)
}
SERVO = {"registers": {"MIN_POSITION_LIMIT": 1000, "MAX_POSITION_LIMIT": 3000}}
RAISED = dict.fromkeys(JOINTS, 0.3)
REST = [2000, 1060, 2940, 2600, 2000, 1100]  # steps: the shares of driver.REST in 1000 to 3000

CLIENT = """
import json, os, sys, time
from vla.robot_drivers import Arm, ArmConfig, SupervisorConfig
content = json.loads(sys.argv[1])
config = ArmConfig(**content | {"supervisor": SupervisorConfig(**content["supervisor"])})
with Arm(config) as arm:
    arm.open()
    arm.enable()
    if sys.argv[2] == "fork" and os.fork() == 0:  # a worker that inherits the pipe and outlives its parent
        time.sleep(15)
        os._exit(0)
    while True:
        arm.setpoint(dict.fromkeys(arm.info.joint_names, 0.3))
        if max(abs(q - 0.3) for q in arm.latest().state.q) < 0.02:
            print("up", flush=True)
        time.sleep(0.02)
"""


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with Emulator([{"encoder": 2000.0}] * 6) as emulator:
        driver = make_so101(emulator.port, CALIBRATION, reply_timeout=1.0)
        driver.bus.open()
        driver.write_calibration()
        driver.close()
        yield emulator
        emulator.request("line", mute=False, echo=False)


@pytest.fixture(autouse=True)
def limp(emulator) -> None:
    """Every test finds the arm in the middle of its ranges and without torque."""
    for id in range(1, 7):
        emulator.set(id, encoder=2000.0, registers={"TORQUE_ENABLE": 0})


def config(emulator: Emulator, **changes) -> ArmConfig:
    arguments = {"port": emulator.port, "calibration": CALIBRATION, "reply_timeout": 0.2, "dead_after": 2.0}
    quick = SupervisorConfig(rest_speed=1.0, sample_patience=1.0, lost_after=2.0)
    return ArmConfig("so101", arguments, **{"supervisor": quick} | changes)


def until(done: Callable[[], bool], seconds: float = PATIENCE) -> None:
    begin = time.monotonic()
    while not done():
        assert time.monotonic() - begin < seconds
        time.sleep(0.05)


def track(arm: Arm, setpoint=RAISED, near: float = 0.02) -> None:
    """Follow `setpoint` until the arm is there."""
    begin = time.monotonic()
    while np.abs(arm.latest().state.q - np.array([setpoint[name] for name in JOINTS])).max() > near:
        arm.setpoint(setpoint)
        time.sleep(0.02)
        assert time.monotonic() - begin < PATIENCE


def assert_left_at_rest(emulator: Emulator) -> None:
    """Torque vector, collapsed or not, port reusable: a moment after the last joint was released."""
    assert emulator.registers("TORQUE_ENABLE") == [0] * 6
    assert np.abs(np.array(emulator.registers("PRESENT_POSITION")) - REST).max() < 61  # rest_tolerance
    again = make_so101(**config(emulator).arguments)
    until(lambda: opens(again))
    again.close()


def start_client(emulator: Emulator, mode: str = "", **changes) -> subprocess.Popen:
    command = [sys.executable, "-P", "-c", CLIENT, config(emulator, **changes).to_json(), mode]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert client.stdout.readline() == "up\n"
    assert emulator.registers("TORQUE_ENABLE") == [1] * 6
    return client


@pytest.mark.parametrize(
    "how",
    [
        "SIGKILL with a worker",
        "SIGTERM",
        pytest.param("SIGKILL", marks=pytest.mark.slow),
        pytest.param("SIGINT", marks=pytest.mark.slow),
    ],
)
def test_a_program_that_is_ended_leaves_its_arm_at_rest(emulator, how):
    client = start_client(emulator, "fork" if "worker" in how else "")
    client.send_signal(signal.Signals[how.split()[0]])
    client.wait(PATIENCE)
    until(lambda: emulator.registers("TORQUE_ENABLE") == [0] * 6)
    assert_left_at_rest(emulator)
    client.stdout.close()


def test_a_program_that_hangs_leaves_its_arm_at_rest_and_finds_out_when_it_wakes(emulator):
    client = start_client(emulator, heartbeat_timeout=1.0)
    client.send_signal(signal.SIGSTOP)
    until(lambda: emulator.registers("TORQUE_ENABLE") == [0] * 6)
    assert_left_at_rest(emulator)
    client.send_signal(signal.SIGCONT)
    assert client.wait(PATIENCE) == 1  # ArmEnded
    client.stdout.close()


def test_a_client_may_be_silent_for_as_long_as_nothing_is_energised(emulator):
    with Arm(config(emulator, heartbeat_timeout=0.2)) as arm:
        arm.open()
        time.sleep(0.6)
        assert arm.latest().mode is Mode.OPEN


@pytest.mark.parametrize(
    "signum",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_the_arms_process_itself_obeys_signals(emulator, signum):
    with Arm(config(emulator)) as arm:
        arm.open()
        arm.enable()
        track(arm)
        os.kill(arm.pid, signum)
        with pytest.raises(ArmEnded, match=f"received {signum.name}. The arm is at rest and released"):
            for _ in range(2000):
                arm.setpoint(RAISED)
                time.sleep(0.02)
        assert arm.ending.at_rest
    assert_left_at_rest(emulator)


def test_if_the_arms_process_is_killed_the_arm_holds_and_is_taken_over_without_a_drop(emulator):
    arm = Arm(config(emulator))
    arm.open()
    arm.enable()
    track(arm)
    os.kill(arm.pid, signal.SIGKILL)
    with pytest.raises(ArmEnded, match="was killed"):
        until(lambda: arm.latest() is None)
    assert arm.close() is None
    # On a busy machine the last goal may lie beyond the setpoint (`SafetyFilter`): servos go on to it.
    until(lambda: emulator.registers("PRESENT_POSITION") == emulator.registers("GOAL_POSITION"))
    up = np.array(emulator.registers("PRESENT_POSITION"))
    emulator.trace()
    with Arm(config(emulator)) as again:
        assert again.open().state.enabled == (True,) * 6
        assert again.enable().mode is Mode.HOLD
        assert np.abs(np.array(emulator.registers("PRESENT_POSITION")) - up).max() < 12
        torque = [
            it["parameters"] for it in emulator.trace() if it["code"] == 3 and it["parameters"][0] == 40
        ]
        assert torque == []  # never switched, neither off nor on
        assert again.close().at_rest
    assert_left_at_rest(emulator)


def test_a_computer_that_stands_still_for_longer_than_the_way_to_rest_does_not_drop_the_arm(emulator):
    def stand_still() -> None:
        time.sleep(0.5)
        os.kill(arm.pid, signal.SIGSTOP)
        time.sleep(3.0)
        os.kill(arm.pid, signal.SIGCONT)

    with Arm(config(emulator)) as arm:
        arm.open()
        arm.enable()
        track(arm)
        with ThreadPoolExecutor() as pool:
            stood = pool.submit(stand_still)
            assert arm.close().at_rest
            stood.result()
    assert_left_at_rest(emulator)


def test_a_found_arm_that_nobody_enabled_is_left_as_it_was(emulator):
    for id in range(1, 7):
        emulator.set(id, registers={"TORQUE_ENABLE": 1})
    with Arm(config(emulator)) as arm:
        arm.open()
        assert arm.close().sentence.endswith("The arm was left as it was found.")
    assert emulator.registers("TORQUE_ENABLE") == [1] * 6


def test_a_session_from_open_to_close(emulator):
    with Arm(config(emulator)) as arm:
        assert arm.info.joint_names == JOINTS and arm.info.rest is not None
        with pytest.raises(ModeError, match="'so101' is off"):
            arm.latest()
        arm.open()
        arm.enable()
        track(arm)
        cycle = arm.latest()
        while cycle.asked != RAISED or not np.allclose(cycle.sent, 0.3):
            arm.setpoint(RAISED)
            cycle = arm.latest()
        assert cycle.mode is Mode.TRACK and not cycle.interventions
        assert time.monotonic() - cycle.time < 1.0
        assert cycle.state.temperature.tolist() == [30] * 6 and np.allclose(cycle.state.voltage, 7.4)
        arm.setpoint(RAISED | {"gripper": float("nan")})
        until(lambda: "not finite" in arm.latest().interventions.get("setpoint", ""))
        with pytest.raises(LimitViolation, match="joint names and numbers"):
            arm.setpoint({"gripper": object()})
        with pytest.raises(ModeError, match="would fall"):
            arm.release()
        arm.rest()
        until(lambda: np.abs(arm.latest().state.q - arm.info.rest).max() < 0.02)
        arm.hold()
        track(arm, RAISED | {"wrist_roll": -0.2})
        assert arm.timing.cycles > 20 and 0 < arm.timing.rate < 101
        ending = arm.close()
        assert ending.at_rest and ending.unreleased == ()
    assert arm.close() is ending  # idempotent
    with pytest.raises(ArmEnded):
        arm.setpoint(RAISED)
    assert_left_at_rest(emulator)


def test_a_setpoint_that_is_due_later_is_led_up_to_evenly(emulator, tmp_path):
    """0.1 rad within 0.2 s, at 0.5 rad/s; asked for at once it would be 1.1 rad/s half way."""
    path = tmp_path / "run.jsonl"
    with Arm(config(emulator, record=path)) as arm:
        arm.open()
        arm.enable()
        track(arm, near=0.005)
        begin = time.monotonic()
        arm.setpoint(RAISED | {"wrist_roll": 0.2}, within=0.2)
        until(lambda: arm.latest().sent[4] < 0.22)
        with pytest.raises(ValueError, match="within 0 or more seconds"):
            arm.setpoint(RAISED, within=math.nan)
    sent = [it for it in read_record(path).cycles if it.time > begin and it.sent is not None]
    moved = itertools.takewhile(lambda it: it.sent[4] > 0.22, sent)
    speeds = [(a.sent[4] - b.sent[4]) / (b.time - a.time) for a, b in itertools.pairwise(moved)]
    assert 0.3 < np.quantile([speed for speed in speeds if speed > 0.01], 0.75) < 0.65


def test_an_emergency_stop_releases_at_once_and_closing_does_not_energise_again(emulator):
    with Arm(config(emulator)) as arm:
        arm.open()
        arm.enable()
        track(arm)
        arm.emergency_stop()
        assert emulator.registers("TORQUE_ENABLE") == [0] * 6
        emulator.trace()
    goals = [it for it in emulator.trace() if it["code"] == 0x83]
    assert goals == []
    assert np.abs(np.array(emulator.registers("PRESENT_POSITION")) - REST).max() > 500


def test_what_cannot_start_is_one_sentence_of_its_own_type(emulator, tmp_path):
    nothing = ArmConfig("so101", {"port": str(tmp_path / "none"), "calibration": CALIBRATION})
    with Arm(nothing) as arm, pytest.raises(Disconnected, match="cannot be opened"):
        arm.open()
    with pytest.raises(NotCalibrated, match="There is no calibration at"):
        Arm(ArmConfig("so101", {"port": "x", "calibration": str(tmp_path / "no.json")}))
    with pytest.raises(UserError, match="There is no driver 'so999'"):
        Arm(ArmConfig("so999"))
    with pytest.raises(UserError, match="does not take its arguments"):
        Arm(ArmConfig("so101", {"colour": "red"}))
    with pytest.raises(UserError, match="The rest pose has joints"):
        Arm(config(emulator, rest={"elbow": 0.0}))
    with pytest.raises(UserError, match="must be JSON values"):
        Arm(ArmConfig("so101", {"port": object()}))
    with pytest.raises(UserError, match="heartbeat timeout"):
        ArmConfig("so101", heartbeat_timeout=0)


def test_a_busy_port_is_refused_and_its_owner_not_disturbed(emulator):
    with Arm(config(emulator)) as arm, Arm(config(emulator)) as second:
        arm.open()
        arm.enable()
        with pytest.raises(Disconnected, match="cannot be opened"):
            second.open()
        track(arm)


@pytest.mark.slow
def test_every_cycle_is_recorded_and_a_record_is_driven_again(emulator, tmp_path):
    path = tmp_path / "run.jsonl"
    with Arm(config(emulator, record=path)) as arm:
        arm.open()
        arm.enable()
        track(arm)
        track(arm, RAISED | {"wrist_roll": -0.4})
        assert arm.latest() and arm.recording is None
    record = read_record(path)
    modes = [cycle.mode.value for cycle in record.cycles]
    changes = [modes[i] for i in range(len(modes)) if i == 0 or modes[i] != modes[i - 1]]
    assert changes[0] == "open" and changes[1:3] == ["hold", "track"] and changes[-2:] == ["hold", "rest"]
    with Arm(config(emulator)) as arm:
        arm.open()
        arm.enable()
        seen = []
        done = replay(record, arm, speed=2.0, on_cycle=seen.append)
        driven = track_of(record)
        assert done.duration == pytest.approx(driven.duration / 2, abs=0.5)
        assert np.allclose(seen[-1].state.q, driven.goals[-1], atol=0.16)
        assert abs(seen[0].state.q[4]) < 0.02 and seen[-1].state.q[4] < -0.2
        with pytest.raises(UserError, match="cannot be 9 times"):
            replay(record, arm, speed=9.0)


def test_a_record_without_motion_or_of_another_arm_is_not_driven(emulator, tmp_path):
    with Arm(config(emulator, record=tmp_path / "run.jsonl")) as arm:
        arm.open()
        time.sleep(0.2)
    record = read_record(tmp_path / "run.jsonl")
    with pytest.raises(UserError, match="holds no motion"):
        track_of(record)
    with Arm(config(emulator)) as arm:
        other = replace(record, info=replace(record.info, joints=record.info.joints[:2], rest=None))
        with pytest.raises(UserError, match="The record is of joints"):
            replay(other, arm)

"""LeRobot steers an SO101 through us: as a robot type of its own, and by its own unmodified commands.

The servos are emulated; processes, signals, the serial port and the clock are real.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vla.errors import UserError
from vla.robot_drivers import (
    DriverFault,
    LimitViolation,
    NotCalibrated,
    ServoFault,
    SupervisorConfig,
    Workspace,
)
from vla.robot_drivers.cameras import StaleFrame
from vla.robot_drivers.emulation import Emulator
from vla.robot_drivers.recorder import read_record
from vla.robot_drivers.so101.calibration import JOINTS
from vla.robot_drivers.so101.driver import VELOCITY, make_so101

KEYS = [f"{name}.pos" for name in JOINTS]
CONTENT = {
    name: {"id": id, "drive_mode": 0, "homing_offset": 0, "range_min": 1000, "range_max": 3000}
    for id, name in enumerate(JOINTS, 1)
}
REST = [2000, 1060, 2940, 2600, 2000, 1100]  # steps: the shares of driver.REST in 1000 to 3000
PATIENCE = 60.0  # s, for a loaded machine
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with Emulator([{"encoder": 2000.0}] * 6) as emulator:
        driver = make_so101(emulator.port, CONTENT, reply_timeout=1.0)
        driver.bus.open()
        driver.write_calibration()
        driver.close()
        yield emulator


@pytest.fixture(autouse=True)
def limp(emulator, request) -> None:
    """Every test finds the arm in the middle of its ranges and without torque."""
    for id in range(1, 7):
        emulator.set(id, encoder=2000.0, temperature=30, registers={"TORQUE_ENABLE": 0})


@pytest.fixture
def calibrated(tmp_path) -> Path:
    (tmp_path / "arm.json").write_text(json.dumps(CONTENT, indent=4))
    return tmp_path


@pytest.fixture
def make(emulator):
    """Make robots as LeRobot's commands do, patient with a loaded machine; none outlives its test."""
    from lerobot.robots import make_robot_from_config

    from lerobot_policy_cogmerge import CogMergeSo101Config

    robots = []

    def make(folder, **changes):
        options = {
            "driver_options": {"reply_timeout": 0.5, "dead_after": 4.0},
            "supervisor": SupervisorConfig(rest_speed=1.0, sample_patience=2.0, lost_after=4.0),
            "soft_start": 0.2,
        } | changes
        config = CogMergeSo101Config(port=emulator.port, id="arm", calibration_dir=folder, **options)
        robots.append(make_robot_from_config(config))
        return robots[-1]

    yield make
    for robot in robots:
        if robot.is_connected:
            robot.disconnect()


def assert_left_at_rest(emulator: Emulator) -> None:
    """Torque vector, collapsed or not, port reusable."""
    assert emulator.registers("TORQUE_ENABLE") == [0] * 6
    assert np.abs(np.array(emulator.registers("PRESENT_POSITION")) - REST).max() < 61  # rest_tolerance
    again = make_so101(emulator.port, CONTENT, reply_timeout=1.0)
    again.open()
    again.close()


def drive(robot, action, near=1.0) -> dict:
    """Send the action until the arm is there."""
    begin = time.monotonic()
    while True:
        robot.send_action(action)
        seen = robot.get_observation()
        if max(abs(seen[key] - action[key]) for key in KEYS) < near:
            return seen
        time.sleep(0.03)
        assert time.monotonic() - begin < PATIENCE, seen


def test_lerobot_discovers_a_robot_with_its_own_followers_features(calibrated, monkeypatch):
    from lerobot.robots import RobotConfig, make_robot_from_config
    from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig
    from lerobot.utils.import_utils import register_third_party_plugins

    from lerobot_policy_cogmerge import CogMergeEmulatedCameraConfig, CogMergeSo101

    register_third_party_plugins()
    known = RobotConfig.get_known_choices()
    camera = CogMergeEmulatedCameraConfig(address="nowhere", camera="top", width=64, height=48)
    options = {"port": "nowhere", "id": "arm", "calibration_dir": calibrated, "cameras": {"top": camera}}
    ours = make_robot_from_config(known["cogmerge_so101"](**options))
    theirs = SO101Follower(SO101FollowerConfig(**options))
    assert isinstance(ours, CogMergeSo101)
    assert ours.observation_features == theirs.observation_features
    assert ours.action_features == theirs.action_features and list(ours.action_features) == KEYS
    assert ours.name == theirs.name  # a dataset begun with one is continued with the other
    assert ours.calibration == theirs.calibration and ours.calibration_fpath == theirs.calibration_fpath
    at_home = {"port": "nowhere", "id": "arm"}
    monkeypatch.setattr(Path, "mkdir", lambda *arguments, **options: None)
    path = SO101Follower(SO101FollowerConfig(**at_home)).calibration_fpath
    assert make_robot_from_config(known["cogmerge_so101"](**at_home)).calibration_fpath == path


def test_it_holds_moves_within_the_limits_and_is_left_at_rest(emulator, calibrated, make):
    record = calibrated / "run.jsonl"
    robot = make(calibrated, record=record)
    robot.connect()
    assert emulator.registers("TORQUE_ENABLE") == [1] * 6
    start = robot.get_observation()
    assert [start[key] for key in KEYS] == pytest.approx([0, 0, 0, 0, 0, 50], abs=0.1)
    drive(robot, dict.fromkeys(KEYS, 20.0), near=0.1)
    begin, arrived = time.monotonic(), [2000 + 20 * 4095 / 360] * 5 + [1000 + 20 * 20]
    while np.abs(np.array(emulator.registers("PRESENT_POSITION")) - arrived).max() > 1:
        robot.send_action(dict.fromkeys(KEYS, 20.0))
        time.sleep(0.03)
        assert time.monotonic() - begin < PATIENCE, emulator.registers("PRESENT_POSITION")
    beyond = dict.fromkeys(KEYS, 20.0) | {"shoulder_pan.pos": 300.0}
    begin, limit = time.monotonic(), 1000 * 360 / 4095
    while (sent := robot.send_action(beyond)["shoulder_pan.pos"]) < 0.95 * limit:
        time.sleep(0.02)
        assert time.monotonic() - begin < PATIENCE, sent
    for _ in range(50):
        assert robot.send_action(beyond)["shoulder_pan.pos"] < limit  # what goes out, not what is asked for
        time.sleep(0.02)
    robot.disconnect()
    assert not robot.is_connected
    assert_left_at_rest(emulator)
    cycles = read_record(record).cycles
    speeds = [
        np.abs(b.sent - a.sent).max() / (b.time - a.time)
        for a, b in itertools.pairwise(cycles)
        if a.sent is not None and b.sent is not None
    ]
    assert max(speeds) < VELOCITY * 1.001


def test_an_action_is_due_when_the_tool_is_likely_to_send_the_next(calibrated, make, monkeypatch):
    robot, asked = make(calibrated), []
    robot.connect()
    monkeypatch.setattr(robot._arm, "setpoint", lambda q, within=0.0: asked.append(within))
    here = {key: robot.get_observation()[key] for key in KEYS}
    begin = time.monotonic()
    for pause in (0.03, 0.3, 0.0):
        robot.send_action(here)
        time.sleep(pause)
    assert asked[0] == asked[2] == 0.1  # nobody knows yet; seldom
    assert 0.03 <= asked[1] <= min(time.monotonic() - begin - 0.3, 0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_action_that_is_none_is_refused_by_name(emulator, calibrated, make, value):
    robot = make(calibrated)
    robot.connect()
    here = {key: robot.get_observation()[key] for key in KEYS}
    with pytest.raises(LimitViolation, match=r"wrong are elbow_flex\.pos"):
        robot.send_action(here | {"elbow_flex.pos": value})
    with pytest.raises(LimitViolation, match=r"wrong are gripper\.pos, grippr\.pos"):
        robot.send_action({key.replace("gripper", "grippr"): it for key, it in here.items()})
    robot.send_action(here | {"base.vel": 1.0})  # of another kind, as LeRobot's follower ignores it
    robot.disconnect()
    assert_left_at_rest(emulator)


def test_a_tool_that_is_busy_finds_the_arm_at_rest_and_brings_it_back_slowly(
    emulator, calibrated, make, caplog
):
    watchdog = SupervisorConfig(
        stale_rest=2.0, rest_speed=1.0, sample_patience=2.0, lost_after=4.0, behind_after=30.0
    )
    robot = make(calibrated, supervisor=watchdog)
    robot.connect()
    drive(robot, dict.fromkeys(KEYS, 20.0))
    caplog.clear()
    begin = time.monotonic()
    while np.abs(np.array(emulator.registers("PRESENT_POSITION")) - REST).max() > 61:
        time.sleep(0.1)
        assert time.monotonic() - begin < PATIENCE
    assert emulator.registers("TORQUE_ENABLE") == [1] * 6  # at rest, not let go
    drive(robot, dict.fromkeys(KEYS, 20.0))
    assert caplog.text.count("it follows again") >= 1
    robot.disconnect()
    assert_left_at_rest(emulator)


def test_silence_for_too_long_leaves_the_arm_and_the_next_call_says_so(emulator, calibrated, make):
    robot = make(calibrated, silence=1.0)
    robot.connect()
    begin = time.monotonic()
    while any(emulator.registers("TORQUE_ENABLE")):
        time.sleep(0.2)
        assert time.monotonic() - begin < PATIENCE
    with pytest.raises(DriverFault, match=r"was silent for .* at rest and released"):
        robot.get_observation()
    robot.disconnect()
    assert_left_at_rest(emulator)


def test_a_fault_reaches_the_tool_by_its_name(emulator, calibrated, make):
    robot = make(calibrated)
    robot.connect()
    drive(robot, dict.fromkeys(KEYS, 10.0))
    emulator.set(2, temperature=90)
    with pytest.raises(ServoFault, match="'shoulder_lift' reports overheating"):
        for _ in range(500):
            robot.get_observation()
            time.sleep(0.01)
    with pytest.raises(ServoFault):
        robot.send_action(dict.fromkeys(KEYS, 0.0))
    with pytest.raises(DriverFault, match="not seen at rest"):  # the joint is limp, in this world it stays
        robot.disconnect()
    assert emulator.registers("TORQUE_ENABLE") == [0] * 6 and not robot.is_connected


def test_what_cannot_be_connected_is_one_sentence_and_leaves_the_arm_alone(emulator, calibrated, make):
    (calibrated / "arm.json").write_text(
        json.dumps(CONTENT | {"gripper": CONTENT["gripper"] | {"range_max": 2900}})
    )
    robot = make(calibrated)
    with pytest.raises(NotCalibrated, match="calibrated again"):
        robot.connect()
    assert not robot.is_connected and emulator.registers("TORQUE_ENABLE") == [0] * 6
    with pytest.raises(UserError, match="vla robot calibrate"):
        robot.calibrate()
    with pytest.raises(ConnectionError, match="is not connected"):
        robot.get_observation()
    (calibrated / "arm.json").unlink()
    with pytest.raises(NotCalibrated, match="There is no calibration"):
        make(calibrated).connect()


class OnceACamera:
    """Gives one picture, then blocks: a cable that was pulled."""

    height, width = 4, 6

    def __init__(self):
        self.given = False

    def connect(self) -> None:
        """It is there."""

    def read(self) -> np.ndarray:
        if self.given:
            time.sleep(60)
        self.given = True
        return np.full((4, 6, 3), 7, np.uint8)

    def disconnect(self) -> None:
        """It was there."""


def test_an_old_picture_is_no_observation(emulator, calibrated, make, monkeypatch):
    monkeypatch.setattr("vla.robot_drivers.cameras.CLOSE_TIMEOUT", 0.1)
    robot = make(calibrated, max_frame_age=3.0)
    robot.cameras = {"top": OnceACamera()}
    robot.connect()
    assert robot.get_observation()["top"].tolist() == np.full((4, 6, 3), 7).tolist()
    with pytest.raises(StaleFrame, match="'top' has given no picture"):
        for _ in range(100):
            robot.get_observation()
            time.sleep(0.05)
    robot.disconnect()
    assert_left_at_rest(emulator)


def test_units_of_minus_100_to_100_are_lerobots(emulator, calibrated, make):
    from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

    for id in range(1, 7):
        emulator.set(id, encoder=1300.0 + 200 * id)
    options = {"port": emulator.port, "id": "arm", "calibration_dir": calibrated, "use_degrees": False}
    theirs = SO101Follower(SO101FollowerConfig(**options))
    robot = make(calibrated, use_degrees=False)
    robot.connect()
    ours = robot.get_observation()
    raw = {name: 1300 + 200 * id for id, name in enumerate(JOINTS, 1)}
    expected = theirs.bus._normalize({theirs.bus.motors[name].id: it for name, it in raw.items()})
    for id, name in enumerate(JOINTS, 1):
        assert ours[f"{name}.pos"] == pytest.approx(expected[id], abs=0.11)  # a step is 0.1
    robot.disconnect()
    (calibrated / "arm.json").write_text(
        json.dumps(CONTENT | {"wrist_roll": CONTENT["wrist_roll"] | {"drive_mode": 1}})
    )
    with pytest.raises(ValueError, match="turns wrist_roll round"):  # LeRobot's factory wraps the sentence
        make(calibrated, use_degrees=False)
    make(calibrated)


def lerobot(command: str, *arguments: str, **environment: str) -> None:
    """Run one of LeRobot's installed commands."""
    done = subprocess.run(
        [BIN / f"lerobot-{command}", *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def robot_arguments(emulator, folder) -> list[str]:
    return [
        "--robot.type=cogmerge_so101",
        f"--robot.port={emulator.port}",
        "--robot.id=arm",
        f"--robot.calibration_dir={folder}",
        "--robot.driver_options={reply_timeout: 0.2, dead_after: 2.0}",
        "--robot.supervisor.sample_patience=1.0",
        "--robot.supervisor.lost_after=2.0",
        "--robot.soft_start=0.5",
    ]


def wave(k: int) -> list[float]:
    """The action of frame `k` at 20 Hz: a sweep of 30° that its joints can follow, in 2 s."""
    swing = 30 * math.sin(2 * math.pi * k / 80)
    return [swing, 0.0, 10.0, 0.0, -swing, 50.0 + swing]


@pytest.mark.slow  # LeRobot's imports, in a process of their own
def test_lerobot_replay_drives_an_episode_through_our_safety(emulator, calibrated):
    from lerobot.datasets import LeRobotDataset

    feature = {"dtype": "float32", "shape": (6,), "names": KEYS}
    dataset = LeRobotDataset.create(
        "me/wave", 20, root=calibrated / "wave", features={"action": feature, "observation.state": feature}
    )
    for k in range(60):
        row = np.array(wave(k), np.float32)
        dataset.add_frame({"action": row, "observation.state": row, "task": "wave"})
    dataset.save_episode()
    dataset.finalize()
    record = calibrated / "run.jsonl"
    where = ["--dataset.repo_id=me/wave", f"--dataset.root={calibrated / 'wave'}", "--dataset.episode=0"]
    lerobot(
        "replay",
        *robot_arguments(emulator, calibrated),
        f"--robot.record={record}",
        "--robot.workspace=[-0.5, 0.5, -0.5, 0.5, 0.22, 0.5]",
        *where,
        "--play_sounds=false",
    )
    assert_left_at_rest(emulator)
    run = read_record(record)
    kinematics = Workspace((-0.5, 0.5, -0.5, 0.5, 0.22, 0.5), run.info).kinematics
    heights = [kinematics(it.sent)[0][2] for it in run.cycles if it.mode.value == "track"]
    assert kinematics(np.radians(wave(0)))[0][2] < 0.21 < 0.22 <= min(heights) < 0.23  # stopped by the floor
    tracked = np.array([it.state.q for it in run.cycles if it.asked is not None and it.mode.value == "track"])
    assert np.degrees(np.ptp(tracked[:, 0])) == pytest.approx(60, abs=6)
    assert np.ptp(tracked[:, 5]) == pytest.approx(0.6, abs=0.06)


TELEOPERATOR = """
import math, time
from dataclasses import dataclass
from lerobot.teleoperators import Teleoperator, TeleoperatorConfig

@TeleoperatorConfig.register_subclass("wave")
@dataclass
class WaveConfig(TeleoperatorConfig):
    pass

class Wave(Teleoperator):
    config_class, name = WaveConfig, "wave"
    is_connected = is_calibrated = True
    feedback_features = {}
    action_features = dict.fromkeys(KEYS, float)
    def connect(self, calibrate=True): self.begin = time.monotonic()
    def calibrate(self): pass
    def configure(self): pass
    def send_feedback(self, feedback): pass
    def disconnect(self): pass
    def get_action(self):
        swing = 20 * math.sin(2 * math.pi * (time.monotonic() - self.begin) / 4)
        return dict(zip(KEYS, [swing, -75.0, 80.0, 40.0, -swing, 20.0]))
"""


@pytest.mark.slow  # LeRobot's imports, MuJoCo and its cameras in real time
def test_lerobot_record_writes_a_dataset_of_an_arm_that_we_keep_safe(tmp_path):
    """Its teleoperator is a plug-in of this test: LeRobot ships none that needs no hardware or screen."""
    from lerobot.datasets import LeRobotDataset

    plugins = tmp_path / "plugins"
    info = plugins / "lerobot_teleoperator_wave-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lerobot_teleoperator_wave\nVersion: 1\n")
    (plugins / "lerobot_teleoperator_wave.py").write_text(f"KEYS = {KEYS}\n{TELEOPERATOR}")
    with Emulator(tabletop=3, cameras=(48, 64)) as emulator:
        (tmp_path / "arm.json").write_bytes(emulator.calibration_file.read_bytes())
        camera = "{type: cogmerge_emulated, address: %s, camera: top, width: 64, height: 48, fps: 10}"
        lerobot(
            "record",
            *robot_arguments(emulator, tmp_path),
            "--robot.cameras={top: %s}" % (camera % emulator.camera_address),
            "--robot.max_frame_age=3.0",
            *("--teleop.type=wave", "--dataset.repo_id=me/waving", f"--dataset.root={tmp_path / 'waving'}"),
            *("--dataset.num_episodes=1", "--dataset.episode_time_s=5", "--dataset.fps=10"),
            *("--dataset.single_task=wave", "--dataset.push_to_hub=false", "--dataset.video=false"),
            "--play_sounds=false",
            PYTHONPATH=str(plugins),
        )
        assert emulator.registers("TORQUE_ENABLE") == [0] * 6
    (folder,) = [it.parent.parent for it in tmp_path.glob("**/meta/info.json")]
    dataset = LeRobotDataset("me/waving", root=folder)
    assert dataset.meta.robot_type == "so_follower"
    assert dataset.features["observation.state"]["names"] == dataset.features["action"]["names"] == KEYS
    assert dataset.num_frames > 10 and dataset[0]["observation.images.top"].shape == (3, 48, 64)
    table = dataset.hf_dataset.with_format("numpy")
    states, actions = np.stack(table["observation.state"]), np.stack(table["action"])
    assert np.ptp(states[:, 0]) > 10 and np.ptp(actions[:, 0]) > 20  # degrees: it moved, as it was asked to

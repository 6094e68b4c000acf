"""LeRobot's own, unmodified SO101 follower drives the emulated bus."""

import json
import math

import pytest

from vla.robot_drivers.emulation import Emulator

NAMES = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")


@pytest.mark.slow  # LeRobot's imports
def test_lerobots_follower_connects_moves_and_lets_go(tmp_path):
    from lerobot.motors import MotorCalibration
    from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

    content = {
        name: {"id": id, "drive_mode": 0, "homing_offset": 0, "range_min": 1000, "range_max": 3000}
        for id, name in enumerate(NAMES, 1)
    }
    (tmp_path / "arm.json").write_text(json.dumps(content))
    with Emulator(6, lockstep=1 / 30) as emulator:
        robot = SO101Follower(SO101FollowerConfig(port=emulator.port, id="arm", calibration_dir=tmp_path))
        be_patient(robot.bus.port_handler)
        robot.bus.connect()
        robot.bus.write_calibration({name: MotorCalibration(**entry) for name, entry in content.items()})
        robot.configure()
        assert robot.is_calibrated and robot.is_connected
        assert emulator.registers("TORQUE_ENABLE") == [1] * 6
        action = {f"{name}.pos": 20.0 for name in NAMES}
        for _ in range(60):
            robot.send_action(action)
            observation = robot.get_observation()
        assert all(abs(observation[key] - 20.0) < 0.1 for key in action)
        encoder = emulator.servos()[1]["encoder"]
        assert abs(encoder - (2000 + 20 * 4095 / 360)) < 2
        robot.disconnect()
        assert emulator.registers("TORQUE_ENABLE") == [0] * 6


def be_patient(port) -> None:
    """LeRobot gives a reply 50 ms; a loaded machine may take longer to schedule the emulator."""
    set_timeout = port.setPacketTimeout

    def generous(length: int) -> None:
        set_timeout(length)
        port.packet_timeout *= 100

    port.setPacketTimeout = generous


@pytest.mark.slow  # LeRobot's imports
def test_lerobots_follower_sees_and_moves_the_arm_at_its_table():
    from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

    from lerobot_policy_cogmerge import CogMergeEmulatedCameraConfig

    with Emulator(lockstep=0.04, tabletop=3, cameras=(48, 64)) as emulator:
        cameras = {
            name: CogMergeEmulatedCameraConfig(
                address=emulator.camera_address, camera=name, width=64, height=48
            )
            for name in ("top", "wrist")
        }
        file = emulator.calibration_file
        config = SO101FollowerConfig(
            port=emulator.port, id=file.stem, calibration_dir=file.parent, cameras=cameras
        )
        robot = SO101Follower(config)
        be_patient(robot.bus.port_handler)
        robot.connect()  # asks nothing: the servos carry the calibration of the file
        before = robot.get_observation()
        assert before["top"].shape == before["wrist"].shape == (48, 64, 3)
        start = {key: value for key, value in before.items() if key.endswith(".pos")}
        for k in range(40):
            robot.send_action(start | {"shoulder_pan.pos": min(k, 20) + start["shoulder_pan.pos"]})
        after = robot.get_observation()
        moved = emulator.look()["angles"][0]
        assert after["shoulder_pan.pos"] - start["shoulder_pan.pos"] == pytest.approx(20, abs=0.3)
        assert after["shoulder_pan.pos"] == pytest.approx(math.degrees(moved), abs=0.2)
        assert (after["top"] != before["top"]).any()
        assert (after["top"] == emulator.camera("top").read()).all()
        robot.disconnect()
        cameras["top"].width = 640
        with pytest.raises(ConnectionError, match="is 48x64, not 48x640"):
            SO101Follower(config).cameras["top"].connect()

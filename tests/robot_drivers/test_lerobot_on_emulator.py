"""LeRobot's own, unmodified SO101 follower drives the emulated bus."""

import json

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

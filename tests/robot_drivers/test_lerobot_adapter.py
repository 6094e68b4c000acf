"""LeRobot's robots under our filter and supervisor: a made-up one, and its own SO101 on the emulated bus."""

import math
import termios
from types import SimpleNamespace

import numpy as np
import pytest

from vla.errors import UserError
from vla.robot_drivers import (
    BusCorrupt,
    BusTimeout,
    Disconnected,
    DriverFault,
    Mode,
    NotCalibrated,
    Supervisor,
    SupervisorConfig,
)
from vla.robot_drivers.adapters.lerobot_robot import LeRobotAdapter, LeRobotJoint, make_lerobot
from vla.robot_drivers.emulation import Emulator
from vla.robot_drivers.so101.calibration import JOINTS, JointCalibration, save_calibration

ARM = {
    "lift": LeRobotJoint(-90, 90, 120, 700),
    "gripper": LeRobotJoint(0, 100, 200, 1200, unit="percent", kind="gripper"),
}
REST = {"lift": -30.0, "gripper": 5.0}


class Robot:
    """What `lerobot.robots.Robot` promises, and nothing more; goes at once where it is told."""

    name = "made_up"

    def __init__(self):
        self.config = SimpleNamespace(disable_torque_on_disconnect=True)
        self.action_features = {"lift.pos": float, "gripper.pos": float}
        self.q = {"lift.pos": 10.0, "gripper.pos": 50.0}
        self.is_connected, self.is_calibrated = False, True
        self.fails: dict[str, Exception] = {}
        self.sent: list[dict[str, float]] = []

    def _may_fail(self, call: str) -> None:
        if call in self.fails:
            raise self.fails[call]

    def connect(self, calibrate=True):
        assert calibrate is False  # LeRobot would ask a person
        self._may_fail("connect")
        self.is_connected = True

    def get_observation(self):
        self._may_fail("get_observation")
        return dict(self.q) | {"camera": np.zeros((2, 2, 3))}

    def send_action(self, action):
        self._may_fail("send_action")
        self.sent.append(action)
        self.q = dict(action)
        return action

    def disconnect(self):
        self._may_fail("disconnect")
        self.is_connected = False


def adapter(robot: Robot) -> LeRobotAdapter:
    return LeRobotAdapter(robot, ARM, REST, control_rate=50, clock=lambda: 0.0)


def test_units_are_ours_above_and_lerobots_below():
    robot = Robot()
    driver = adapter(robot)
    lift, gripper = driver.info.joints
    assert (lift.unit, gripper.unit, gripper.kind) == ("rad", "fraction", "gripper")
    assert (lift.lower, lift.upper, lift.velocity) == pytest.approx(
        (-math.pi / 2, math.pi / 2, 2 * math.pi / 3)
    )
    assert driver.info.rest == pytest.approx((-math.pi / 6, 0.05))
    driver.open()
    assert driver.read().q == pytest.approx([math.pi / 18, 0.5])
    driver.write(np.array([math.pi / 4, 0.25]))
    assert robot.sent[-1] == pytest.approx({"lift.pos": 45.0, "gripper.pos": 25.0})
    assert robot.config.disable_torque_on_disconnect is False  # closing or forgetting it drops nothing


def test_an_arm_of_lerobots_is_tracked_bounded_and_laid_to_rest():
    robot = Robot()
    supervisor = Supervisor(adapter(robot), np.array([-math.pi / 6, 0.05]))
    supervisor.open()
    supervisor.enable(0.0)
    now = 0.0
    for _ in range(400):
        now += 0.02
        supervisor.driver._clock = lambda now=now: now
        supervisor.setpoint({"lift": 9.0, "gripper": math.pi}, now)
        supervisor.cycle(now)
    lifts = np.array([action["lift.pos"] for action in robot.sent])
    assert lifts.max() == pytest.approx(90 - 1.8, abs=0.1)  # the limit less its margin
    assert np.abs(np.diff(lifts)).max() <= 120 * 0.02 + 1e-6
    supervisor.rest(now)
    for _ in range(400):
        now += 0.02
        supervisor.driver._clock = lambda now=now: now
        supervisor.cycle(now)
    assert supervisor.at_rest and robot.q["lift.pos"] == pytest.approx(-30.0, abs=0.01)
    assert supervisor.release() == [] and not robot.is_connected


@pytest.mark.parametrize(
    ("error", "connected", "fault"),
    [
        (ConnectionError("Failed to sync read: no status packet"), True, BusTimeout),
        (ConnectionError("DeviceNotConnectedError"), False, Disconnected),
        (OSError(5, "Input/output error"), True, Disconnected),
        (termios.error(5, "Input/output error"), True, Disconnected),
        (RuntimeError("Overload error!"), True, BusCorrupt),
        (IndexError("list index out of range"), True, BusCorrupt),
        (TypeError("None"), True, BusCorrupt),
    ],
)
def test_nothing_but_driver_faults_comes_out(error, connected, fault):
    robot = Robot()
    driver = adapter(robot)
    driver.open()
    robot.is_connected = connected
    robot.fails = dict.fromkeys(("get_observation", "send_action", "disconnect"), error)
    for call in (driver.read, driver.hold, lambda: driver.write(np.zeros(2))):
        with pytest.raises(fault):
            call()
    assert all(isinstance(it, DriverFault) for it in driver.disable())
    driver.close()  # never raises


def test_what_cannot_be_connected_is_said():
    robot = Robot()
    robot.fails["connect"] = ConnectionError("Could not connect on port")
    with pytest.raises(Disconnected, match="Could not connect on port"):
        adapter(robot).open()
    robot.fails.clear()
    robot.is_calibrated = False
    with pytest.raises(NotCalibrated, match="'made_up' does not carry its calibration"):
        adapter(robot).open()
    assert not robot.is_connected


def test_joints_must_be_the_robots():
    with pytest.raises(UserError, match="The joints given are of"):
        LeRobotAdapter(Robot(), {"lift": ARM["lift"]}, REST)
    with pytest.raises(UserError, match="The rest pose given"):
        LeRobotAdapter(Robot(), ARM, {"lift": 0.0})
    with pytest.raises(UserError, match="unit is 'turns'"):
        LeRobotJoint(0, 1, 1, 1, unit="turns")


@pytest.mark.slow  # LeRobot's imports
def test_lerobots_own_so101_is_driven_by_our_supervisor(tmp_path):
    calibration = {name: JointCalibration(id, 0, 0, 1000, 3000) for id, name in enumerate(JOINTS, 1)}
    save_calibration(tmp_path / "arm.json", calibration)
    eeprom = {"MIN_POSITION_LIMIT": 1000, "MAX_POSITION_LIMIT": 3000}
    body = {"lower": -87, "upper": 87, "velocity": 115, "acceleration": 690}
    gripper = {"lower": 0, "upper": 100, "velocity": 200, "acceleration": 1200}
    joints = dict.fromkeys(JOINTS[:5], body) | {"gripper": gripper | {"unit": "percent", "kind": "gripper"}}
    rest = dict.fromkeys(JOINTS, 0.0) | {"gripper": 50.0}
    with Emulator([{"encoder": 2000.0}] * 6, lockstep=0.02) as emulator:
        for id in range(1, 7):
            emulator.set(id, registers=eeprom)
        settings = {"port": emulator.port, "id": "arm", "calibration_dir": str(tmp_path)}
        driver = make_lerobot("so101_follower", joints, rest, settings, control_rate=50)
        be_patient(driver.robot.bus.port_handler)
        now = [0.0]
        driver._clock = lambda: now[0]
        supervisor = Supervisor(driver, np.array(driver.info.rest), config=SupervisorConfig(rest_speed=1.0))
        supervisor.open()
        supervisor.enable(now[0])
        assert emulator.registers("TORQUE_ENABLE") == [1] * 6

        def run(cycles: int, setpoint=None):
            for _ in range(cycles):
                now[0] += 0.02
                if setpoint is not None:
                    supervisor.setpoint(setpoint, now[0])
                cycle = supervisor.cycle(now[0])
            return cycle

        up = dict.fromkeys(JOINTS, 0.4)
        assert run(60, up).mode is Mode.TRACK
        assert np.abs(run(5, up).state.q - 0.4).max() < 0.01
        assert emulator.servos()[1]["encoder"] == pytest.approx(2000 + 0.4 * 4095 / (2 * math.pi), abs=2)

        # LeRobot alone: every observation after a late reply is one frame old, for the rest of the run.
        emulator.inject("delay", count=6, seconds=0.3, instruction=0x82)
        run(5, up)
        down = dict.fromkeys(JOINTS, 0.0) | {"gripper": 0.5}
        state = run(60, down).state
        assert np.abs(state.q[:5]).max() < 0.01

        # LeRobot alone: an overload on one joint, and disconnecting leaves the others energised.
        emulator.set(2, temperature=80)
        fault = run(2 * 5 + 1, down).fault
        assert "'shoulder_lift' reports lost torque" in str(fault)
        assert supervisor.emergency_stop() == []
        assert emulator.registers("TORQUE_ENABLE") == [0] * 6
        supervisor.close()
        with pytest.raises(UserError, match="LeRobot knows no robot 'so999'"):
            make_lerobot("so999", joints, rest, settings)


def be_patient(port) -> None:
    """LeRobot gives a reply 50 ms; a loaded machine may take longer to schedule the emulator."""
    set_timeout = port.setPacketTimeout

    def generous(length: int) -> None:
        set_timeout(length)
        port.packet_timeout *= 100

    port.setPacketTimeout = generous

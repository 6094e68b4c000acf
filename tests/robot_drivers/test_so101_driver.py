"""The SO101 from calibration file to emulated servos, alone and under the supervisor.

The world is in lockstep and the driver's clock belongs to the test, so runs do not depend on the machine.
After every fault three things are asserted: torque vector, whether the arm collapsed, whether the port works.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from vla.robot_drivers import Disconnected, LimitViolation, Mode, NotCalibrated, ServoFault, Supervisor
from vla.robot_drivers.emulation import Emulator
from vla.robot_drivers.so101.calibration import JOINTS, JointCalibration, load_calibration, save_calibration
from vla.robot_drivers.so101.codec import Instruction
from vla.robot_drivers.so101.driver import FASTEST, So101Driver

DT = 0.01
CALIBRATION = {
    name: JointCalibration(id, int(name == "gripper"), offset, 1000, 3000)
    for id, (name, offset) in enumerate(zip(JOINTS, (120, -340, 77, -512, 900, -33), strict=True), 1)
}
STEP = 2 * math.pi / 4095
REST = np.zeros(6)
RAISED = {name: 0.3 for name in JOINTS}
WORLD = [{"encoder": 2000.0 + it.homing_offset, "falls_to": it.homing_offset} for it in CALIBRATION.values()]


class Bench:
    """A driver, its emulated arm, and the clock that both go by."""

    def __init__(self, emulator: Emulator):
        self.emulator, self.now = emulator, 100.0
        self.driver = So101Driver(emulator.port, CALIBRATION, clock=lambda: self.now, reply_timeout=5.0)
        self.supervisor = Supervisor(self.driver, REST)

    def start(self) -> None:
        self.supervisor.open()
        self.supervisor.enable(self.now)

    def run(self, cycles: int, setpoint=None):
        for _ in range(cycles):
            self.now += DT
            if setpoint is not None:
                self.supervisor.setpoint(setpoint, self.now)
            cycle = self.supervisor.cycle(self.now)
        if self.driver.bus.is_open:  # steering has a channel of its own: let the last goal arrive first
            self.driver.bus.ping("gripper")
        return cycle

    def wait(self, seconds: float) -> None:
        """Let time pass without commands."""
        self.emulator.advance(seconds)
        self.now += seconds

    def torque(self) -> list[int]:
        return self.emulator.registers("TORQUE_ENABLE")

    def heights(self) -> np.ndarray:
        return np.array(self.emulator.registers("PRESENT_POSITION"))


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with Emulator(WORLD, lockstep=DT) as emulator:
        yield emulator


@pytest.fixture
def blank(emulator) -> Iterator[Bench]:
    """An arm as it comes from the factory."""
    emulator.reset()
    bench = Bench(emulator)
    yield bench
    bench.driver.close()


@pytest.fixture
def bench(blank) -> Bench:
    """A calibrated arm, closed and without torque."""
    blank.driver.bus.open()
    blank.driver.write_calibration()
    blank.driver.close()
    blank.emulator.trace()
    return blank


def test_lerobots_file_is_read_and_written_unchanged(tmp_path):
    content = {
        name: {
            "id": it.id,
            "drive_mode": it.drive_mode,
            "homing_offset": it.homing_offset,
            "range_min": it.range_min,
            "range_max": it.range_max,
        }
        for name, it in CALIBRATION.items()
    }
    path = tmp_path / "arm.json"
    path.write_text(json.dumps(content, indent=4))
    calibration = load_calibration(path)
    assert calibration == CALIBRATION
    again = save_calibration(tmp_path / "again.json", calibration)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "There is no calibration at"),
        ("[]", "not a calibration file"),
        ("{", "not a calibration file"),
        ('{"gripper": {"id": 1}}', "not a calibration file"),
        ("{}", "has joints"),
    ],
)
def test_files_that_are_no_calibration_are_one_sentence(tmp_path, content, words):
    path = tmp_path / "arm.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(NotCalibrated, match=words):
        load_calibration(path)


@pytest.mark.parametrize("change", [{"range_min": 3000}, {"range_max": 5000}, {"id": 2}])
def test_calibrations_that_cannot_be_are_refused(tmp_path, change):
    wrong = CALIBRATION | {"shoulder_pan": replace(CALIBRATION["shoulder_pan"], **change)}
    path = save_calibration(tmp_path / "arm.json", wrong)
    with pytest.raises(NotCalibrated):
        load_calibration(path)


def test_units_by_hand():
    """Range 1000 to 3000: the middle is 2000, and 1000 steps are 1000 · 2π / 4095 = 1.5344 rad."""
    pan, gripper = CALIBRATION["shoulder_pan"], CALIBRATION["gripper"]
    assert pan.to_angle(2000) == 0 and pan.to_angle(3000) == pytest.approx(1.5344, abs=1e-4)
    assert pan.from_angle(-1.5344) == 1000
    assert (gripper.to_fraction(1000), gripper.to_fraction(1500)) == (1.0, 0.75)  # drive_mode 1
    assert replace(gripper, drive_mode=0).to_fraction(1500) == 0.25
    assert gripper.from_fraction(0.75) == 1500


def test_an_arm_with_another_calibration_is_refused_and_nothing_is_written(blank):
    with pytest.raises(
        NotCalibrated, match=r"Servo 1 \('shoulder_pan'\) carries 0 at address 31, the calibration 120"
    ):
        blank.supervisor.open()
    assert {frame["code"] for frame in blank.emulator.trace()} == {int(Instruction.READ)}
    assert not blank.driver.bus.is_open and blank.supervisor.mode is Mode.OFF


def test_a_calibration_is_kept_without_power_and_not_written_into_a_held_arm(bench):
    bench.emulator.request("power", on=False)
    bench.emulator.request("power", on=True)
    bench.start()
    assert np.allclose(bench.driver.read().q[:5], 0)
    with pytest.raises(NotCalibrated, match="have torque"):
        bench.driver.write_calibration()


def test_enabling_moves_nothing_and_writes_the_servos_own_limits_first(bench):
    before = bench.heights()
    bench.start()
    assert bench.torque() == [1] * 6
    assert np.abs(bench.heights() - before).max() <= 1
    assert bench.emulator.registers("GOAL_VELOCITY") == [math.ceil(1.2 * 2.0 / STEP)] * 5 + [4800]
    assert bench.emulator.registers("ACCELERATION") == [math.ceil(1.2 * 12 / STEP / 100)] * 5 + [254]
    assert bench.emulator.registers("TORQUE_LIMIT") == [1000] * 5 + [500]
    written = [(frame["id"], frame["parameters"]) for frame in bench.emulator.trace() if frame["code"] == 3]
    for id in range(1, 7):
        order = [parameters[0] for servo, parameters in written if servo == id]
        assert order == [41, 46, 48, 42, 40, 48, 48, 48]  # limits, goal, torque, then the torque ramp
    shares = [int.from_bytes(bytes(p[1:]), "little") for servo, p in written if servo == 1 and p[0] == 48]
    assert shares == [150, 400, 700, 1000]


def test_a_setpoint_is_reached_within_its_bounds(bench):
    bench.start()
    # Measured over the bus: steering has a channel of its own, and may be ahead of the last goal.
    path = [bench.run(1, RAISED).state.q for _ in range(60)]
    state = bench.run(20, RAISED).state
    assert np.allclose(state.q, 0.3, atol=2 * STEP) and state.enabled == (True,) * 6
    assert np.allclose(state.q_commanded, 0.3)
    speeds = np.abs(np.diff(path, axis=0)).max(axis=0) / DT
    assert (speeds < 1.2 * 2.0 + 0.2).all() and (speeds > 1.0).all()
    assert bench.emulator.servos()[1]["encoder"] == pytest.approx(2000 + 120 + 0.3 / STEP, abs=1.5)


def test_neither_nan_nor_a_wild_setpoint_leaves_the_calibrated_range(bench):
    bench.start()
    bench.run(20, RAISED | {"wrist_roll": math.nan})
    assert np.abs(bench.heights() - 2000).max() <= 1000 and bench.supervisor.mode is Mode.HOLD
    bench.run(200, dict.fromkeys(JOINTS, 300.0))
    heights = bench.heights()
    assert (heights > 1000).all() and (heights < 3000).all() and heights[0] == pytest.approx(2980, abs=2)
    for wrong in ([9.0] * 6, [math.nan] * 6, [0.0]):
        with pytest.raises(LimitViolation):
            bench.driver.write(np.array(wrong))


@pytest.mark.parametrize(
    ("world", "words", "torque"),
    [
        ({"temperature": 80}, "overheating", [1, 0, 1, 1, 1, 1]),
        ({"voltage": 3.8}, "voltage", [1] * 6),
    ],
)
def test_a_status_fault_is_named_in_one_cycle_and_every_joint_is_released_at_the_end(
    bench, world, words, torque
):
    bench.start()
    bench.run(60, RAISED)
    bench.emulator.set(2, **world)
    bench.run(1, RAISED)
    fault = bench.run(1, RAISED).fault
    assert isinstance(fault, ServoFault) and (fault.joint, fault.conditions) == ("shoulder_lift", (words,))
    others = np.delete(bench.heights(), 1)
    bench.run(50, RAISED)
    bench.wait(0.5)
    assert bench.torque() == torque
    assert np.abs(np.delete(bench.heights(), 1) - others).max() < 5  # the others stay up
    assert bench.supervisor.emergency_stop() == []  # LeRobot leaves joints energised here
    assert bench.torque() == [0] * 6
    assert bench.driver.read().faults


def test_a_supply_dip_is_a_fault_and_enabling_again_does_not_leap(bench):
    bench.start()
    bench.run(60, RAISED)
    bench.emulator.request("power", on=False)
    bench.wait(0.2)
    bench.emulator.request("power", on=True)
    cycle = bench.run(1, RAISED)
    assert cycle.mode is Mode.FAULT and "lost torque" in str(cycle.fault) and bench.torque() == [0] * 6
    fallen = bench.heights()
    assert (fallen < 2250).all()  # it did collapse: nothing on this side can prevent that
    bench.supervisor.reset()
    bench.supervisor.enable(bench.now)
    bench.run(10)
    assert np.abs(bench.heights() - fallen).max() < 5 and bench.torque() == [1] * 6


def test_a_jammed_joint_overloads_and_is_reset_without_a_leap(bench):
    bench.start()
    bench.emulator.set(3, jammed=True)
    cycle = bench.run(260, RAISED)
    assert cycle.mode is Mode.FAULT and cycle.fault.conditions == ("overload",)
    assert bench.torque() == [1] * 6
    bench.emulator.set(3, jammed=False, falls_to=None)
    bench.supervisor.reset()
    bench.supervisor.enable(bench.now)
    at = bench.heights()
    bench.run(10)
    assert np.abs(bench.heights() - at).max() < 5


def test_a_pulled_adapter_is_lost_and_reconnecting_keeps_the_arm_up(bench):
    bench.start()
    bench.run(60, RAISED)
    up = bench.heights()
    bench.emulator.request("hangup")
    cycle = bench.run(1, RAISED)
    assert cycle.mode is Mode.LOST and isinstance(cycle.fault, Disconnected)
    assert len(bench.supervisor.emergency_stop()) == 6  # says so, and does not raise
    with pytest.raises(Disconnected):
        bench.supervisor.reset()
    bench.emulator.request("replug")
    bench.emulator.trace()
    bench.supervisor.reset()
    bench.supervisor.enable(bench.now)
    bench.run(5)
    assert bench.torque() == [1] * 6 and np.abs(bench.heights() - up).max() < 5
    writes = [frame["parameters"] for frame in bench.emulator.trace() if frame["code"] == 3]
    assert all(parameters[0] != 40 for parameters in writes)  # torque was not touched


def test_a_silent_policy_ends_at_rest_and_the_arm_is_released_there(bench):
    bench.start()
    bench.run(60, RAISED)
    bench.run(420)
    assert bench.supervisor.mode is Mode.REST and bench.supervisor.at_rest
    assert bench.supervisor.release() == [] and bench.torque() == [0] * 6


def test_a_position_that_leaps_is_not_believed(bench):
    """A frozen or flipped encoder bit with a valid checksum: 1000 steps in one cycle is no motion."""
    bench.start()
    bench.run(5)
    assert FASTEST * 2 * DT < 1000
    bench.emulator.set(1, encoder=3120.0)
    cycle = bench.run(1)
    assert not cycle.fresh and abs(cycle.state.q[0]) < 0.01


def test_one_lost_reply_while_connecting_is_not_a_failure(bench):
    bench.driver.bus.reply_timeout = 1.0
    bench.emulator.inject("drop", count=1, servo=4, instruction=int(Instruction.READ))
    bench.emulator.inject("corrupt", count=1, servo=2, instruction=int(Instruction.WRITE))
    bench.start()
    assert bench.torque() == [1] * 6

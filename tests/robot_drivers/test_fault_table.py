"""The table of everything that goes wrong with an SO101, and what becomes of the arm.

Every row breaks one thing while the arm is raised and follows a policy, and asserts what is left: the torque
vector, whether the arm stayed up, how it is left (`leave`), and that the port can be opened again. No row may
end in a commanded slam, a stale observation taken for a new one, or a servo left energised in silence.

The arm is the emulated one with masses, so it falls if nobody holds it. The world is in lockstep and the
clock is the test's: rows do not depend on the machine. They run twice: with the packets handed over in this
process, and, marked slow, over the serial port of an emulator of its own. Wall-clock times are in
`test_fault_times.py`, ends of the steering program in `test_arm_process.py`, late replies and echoes, which
only a real line has, in `test_so101_bus.py` as well.
"""

import contextlib
import gc
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from vla.robot_drivers import (
    BusTimeout,
    Cycle,
    Disconnected,
    DriverFault,
    Mode,
    SafetyFilter,
    ServoFault,
    Supervisor,
    SupervisorConfig,
    leave,
)
from vla.robot_drivers.emulation import Emulator
from vla.robot_drivers.emulation.direct import direct_driver
from vla.robot_drivers.emulation.process import EmulatorProcess
from vla.robot_drivers.so101.calibration import JOINTS, load_calibration
from vla.robot_drivers.so101.codec import Instruction
from vla.robot_drivers.so101.driver import So101Driver

DT = 0.01
PATIENT, QUICK = 3.0, 0.06  # s for a reply: that must come, and that may be lost
RAISED = dict.fromkeys(JOINTS, 0.0) | {"gripper": 0.3}
LEANING = RAISED | {"shoulder_lift": -0.3}
POSE = [0.0, 0.0, 0.0, 0.0, 0.0, 0.3]  # joint angles of the model: the hand is 23 cm above the table
SYNC_READ, READ, WRITE = int(Instruction.SYNC_READ), int(Instruction.READ), int(Instruction.WRITE)
ON, OFF = [1] * 6, [0] * 6


class Direct:
    """The emulator's world and steering in this process; the bus is handed its packets without a line."""

    def __init__(self, folder: Path):
        named = {"port": str(folder / "port"), "control": str(folder / "control"), "scene": str(folder / "s")}
        rest = {"servos": [], "tabletop": {"seed": 0}, "lockstep": DT, "turnaround": 0.0, "seed": 0}
        self.process = EmulatorProcess(named | rest)
        self.calibration = self.process.tabletop.calibration
        self.port = "(no line)"

    def driver(self, clock) -> So101Driver:
        return direct_driver(self.process.line, self.calibration, DT, clock)

    def request(self, op: str, **arguments):
        return self.process._obey({"op": op} | arguments) or {}

    servos, registers, set = Emulator.servos, Emulator.registers, Emulator.set
    inject, advance, reset, close = Emulator.inject, Emulator.advance, Emulator.reset, lambda self: None


class Served(Emulator):
    """The same over a serial port."""

    def __init__(self, folder: Path):
        super().__init__(tabletop=0, lockstep=DT)
        self._calibration = load_calibration(self.calibration_file)

    def driver(self, clock) -> So101Driver:
        return So101Driver(self.port, self._calibration, clock=clock, reply_timeout=PATIENT)


class Bench:
    """A raised, energised arm under a supervisor, with a clock of its own."""

    def __init__(self, emulator: Direct | Served):
        self.emulator, self.now = emulator, 100.0
        self.emulator.reset()
        self.driver = emulator.driver(lambda: self.now)
        self.supervisor = Supervisor(
            self.driver, np.array(self.driver.info.rest), config=SupervisorConfig(rest_speed=1.0)
        )
        self.wrote = False
        write = self.driver.write

        def noticed(q, dq=None):
            write(q, dq)
            self.wrote = True

        self.driver.write = noticed

    def raise_up(self) -> None:
        """Stand the arm up, energised, following a policy."""
        self.emulator.request("pose", angles=POSE)
        self.supervisor.open()
        self.supervisor.enable(self.now)
        self.run(20, RAISED)
        assert self.supervisor.mode is Mode.TRACK and self.height() > 0.2

    def run(
        self, cycles: int, setpoint=RAISED, until: Callable[[Cycle], bool] = lambda cycle: False
    ) -> Cycle:
        for _ in range(cycles):
            self.pass_time(DT)
            if setpoint is not None:
                self.supervisor.setpoint(setpoint, self.now)
            cycle = self.supervisor.cycle(self.now)
            if until(cycle):
                break
        self.settle()
        return cycle

    def pass_time(self, seconds: float) -> None:
        """Let the clock go on; the world goes with it, by the goal that was sent or without one."""
        self.now += seconds
        if not self.wrote:
            self.emulator.advance(seconds)
        self.wrote = False

    def settle(self) -> None:
        """Steering has a channel of its own: let the last goal arrive first."""
        with contextlib.suppress(DriverFault):
            self.driver.bus.ping("gripper")

    def leave(self):
        return leave(self.supervisor, "", clock=lambda: self.now, sleep=self.pass_time)

    def height(self) -> float:
        return self.emulator.request("look")["height"]

    def torque(self) -> list[int]:
        return self.emulator.registers("TORQUE_ENABLE")

    def true(self) -> np.ndarray:
        """Joint angles as they are, whatever the servos say; the gripper's is left out."""
        return np.array(self.emulator.request("look")["angles"])[:5]

    def mend(self) -> None:
        """Undo what was broken."""
        self.emulator.request("clear")
        self.emulator.request("line", echo=False, mute=False)
        if isinstance(self.emulator, Served) and not os.path.lexists(self.emulator.port):
            self.emulator.request("replug")
        for id, servo in self.emulator.servos().items():
            self.emulator.set(id, connected=True, temperature=30, voltage=7.4, jammed=False, frozen=False)
            if not servo["powered"]:
                self.emulator.request("power", on=True)


@dataclass
class Row:
    """One fault and its outcome.

    `harm` breaks something. Within `cycles` the arm has the fault `fault`, whose sentence has `words`; None
    means that nothing is to be noticed. Then: `torque`, whether it is still `up`, and what `leave` reports.
    """

    name: str
    harm: Callable[[Bench], object]
    fault: type[DriverFault] | tuple[type[DriverFault], ...] | None = None
    words: str = ""
    cycles: int = 10  # 0.1 s
    torque: list[int] = field(default_factory=lambda: ON)
    up: bool = True
    at_rest: bool = True
    unreleased: tuple[str, ...] = ()
    setpoint: dict = field(default_factory=lambda: RAISED)
    mode: Mode = Mode.TRACK
    line_only: bool = False


def replies(kind: str, probability: float = 1.0, count: int = -1, timeout: float = QUICK, **which):
    def harm(bench: Bench) -> None:
        bench.driver.bus.reply_timeout = timeout
        bench.emulator.inject(kind, probability=probability, count=count, **which)

    return harm


def world(id: int, **changes):
    return lambda bench: bench.emulator.set(id, **changes)


def silent(*ids: int):
    def harm(bench: Bench) -> None:
        bench.driver.bus.reply_timeout = QUICK
        for id in ids:
            bench.emulator.set(id, connected=False)

    return harm


def limp_and_silent(*ids: int):
    """A cable that is out takes the supply along as well."""

    def harm(bench: Bench) -> None:
        silent(*ids)(bench)
        for id in ids:
            bench.emulator.set(id, registers={"TORQUE_ENABLE": 0})

    return harm


def supply_dip(bench: Bench) -> None:
    bench.emulator.request("power", on=False)
    bench.pass_time(0.4)
    bench.emulator.request("power", on=True)


def supply_off(bench: Bench) -> None:
    bench.driver.bus.reply_timeout = QUICK
    bench.emulator.request("power", on=False)


def mute(bench: Bench) -> None:
    bench.driver.bus.reply_timeout = QUICK
    bench.emulator.request("line", mute=True)


def two_of_one_id(bench: Bench) -> None:
    """Servo 3 answers as servo 2, so that both talk at once and nobody is understood."""
    silent(3)(bench)
    replies("flip", servo=2)(bench)


def interrupted(bench: Bench) -> None:
    """Ctrl-C in the middle of a transaction."""
    receive = bench.driver.bus._receive

    def interrupt(port, deadline):
        bench.driver.bus._receive = receive
        raise KeyboardInterrupt

    bench.driver.bus._receive = interrupt
    with pytest.raises(KeyboardInterrupt):
        bench.run(1)


LAST = JOINTS[2:]
SILENT = (BusTimeout, Disconnected)  # the same silence, by the supervisor's clock or by the bus's own
ROWS = [
    Row("one reply lost", replies("drop", count=1)),
    Row("5 % of the replies lost", replies("drop", 0.05)),
    Row("5 % with a bad checksum", replies("corrupt", 0.05)),
    Row("10 % with a flipped bit", replies("flip", 0.1)),
    Row("20 % behind garbage", replies("noise", 0.2, timeout=PATIENT)),
    Row("2 % with a byte missing", replies("lose_byte", 0.02)),
    Row("one reply 80 ms late", replies("delay", count=6, seconds=0.08, instruction=SYNC_READ),
        line_only=True),
    Row("a short reply", replies("short", count=1, servo=1)),
    Row("interrupted in a transaction", interrupted, line_only=True),
    Row("overheating", world(2, temperature=80), ServoFault, "'shoulder_lift' reports overheating", up=False,
        torque=[1, 0, 1, 1, 1, 1], at_rest=False),
    Row("undervoltage", world(2, voltage=3.8), ServoFault, "'shoulder_lift' reports voltage"),
    Row("overload by a jam", world(2, jammed=True), ServoFault, "'shoulder_lift' reports overload",
        cycles=280, setpoint=LEANING, at_rest=False),
    Row("a jam without load", world(2, jammed=True), at_rest=False),
    Row("1.2 kg in the hand", lambda bench: bench.emulator.request("payload", mass=1.2), ServoFault,
        "reports overload", cycles=400, up=False, at_rest=False),
    Row("encoder frozen", world(2, frozen=True), ServoFault, "'shoulder_lift' reports no motion", cycles=340,
        setpoint=LEANING, at_rest=False),
    Row("cable to servo 3 out", limp_and_silent(3, 4, 5, 6), SILENT, "elbow_flex",
        cycles=60, torque=[1, 1, 0, 0, 0, 0], up=False, at_rest=False, unreleased=LAST, mode=Mode.LOST),
    Row("servo 6 silent", silent(6), SILENT, "gripper", cycles=60, at_rest=False,
        unreleased=("gripper",), mode=Mode.LOST),
    Row("the bus silent", mute, SILENT, "shoulder_pan", cycles=60, at_rest=False, unreleased=JOINTS,
        mode=Mode.LOST),
    Row("the adapter gone", lambda bench: bench.emulator.request("hangup"), Disconnected, "has vanished",
        cycles=1, at_rest=False, unreleased=JOINTS, mode=Mode.LOST, line_only=True),
    Row("a supply dip of 0.4 s", supply_dip, ServoFault, "reports lost torque", torque=OFF, up=False,
        at_rest=False),
    Row("the motor supply off", supply_off, SILENT, "shoulder_pan", cycles=60, torque=OFF,
        up=False, at_rest=False, unreleased=JOINTS, mode=Mode.LOST),
    Row("NaN from the policy", lambda bench: None, setpoint=RAISED | {"elbow_flex": math.nan},
        mode=Mode.HOLD),
    Row("infinity from the policy", lambda bench: None, setpoint=RAISED | {"elbow_flex": math.inf},
        mode=Mode.HOLD),
    Row("None from the policy", lambda bench: None, setpoint=RAISED | {"elbow_flex": None}, mode=Mode.HOLD),
    Row("an unknown joint from the policy", lambda bench: None, setpoint=RAISED | {"tail": 0.0},
        mode=Mode.HOLD),
    Row("nothing from the policy", lambda bench: None, setpoint={}, mode=Mode.HOLD),
]  # fmt: skip


@pytest.fixture(scope="module", params=[Direct, pytest.param(Served, marks=pytest.mark.slow)])
def emulator(request, tmp_path_factory) -> Iterator[Direct | Served]:
    emulator = request.param(tmp_path_factory.mktemp("emulator"))
    yield emulator
    emulator.close()


@pytest.fixture
def bench(emulator) -> Iterator[Bench]:
    bench = Bench(emulator)
    yield bench
    bench.driver.close()
    bench.mend()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_fault_has_its_outcome(bench, row):
    if row.line_only and isinstance(bench.emulator, Direct):
        pytest.skip("only a line can do this")
    bench.raise_up()
    before = bench.true()
    row.harm(bench)
    cycle = bench.run(row.cycles if row.fault else 60, row.setpoint, until=lambda it: it.fault is not None)
    if row.fault is None:
        assert cycle.fault is None and cycle.mode is row.mode
        assert np.abs(cycle.state.q[:5] - bench.true()).max() < 0.03  # no stale or foreign reading
    else:
        assert isinstance(cycle.fault, row.fault) and row.words in str(cycle.fault), cycle.fault
        assert cycle.mode is (Mode.LOST if row.mode is Mode.LOST else Mode.FAULT)
    bench.pass_time(1.0)  # nobody reacts for a second
    assert bench.torque() == row.torque
    assert (bench.height() > 0.18) is row.up
    if row.fault is None or (row.up and row.setpoint is RAISED):
        assert np.abs(bench.true() - before).max() < 0.05  # held: neither slammed nor sagged
    ending = bench.leave()
    assert (ending.at_rest, ending.unreleased) == (row.at_rest, row.unreleased)
    assert isinstance(bench.emulator, Direct) or not bench.driver.bus.is_open
    bench.mend()
    if not row.unreleased:
        assert bench.torque() == OFF
    assert_port_reusable(bench)


def assert_port_reusable(bench: Bench) -> None:
    """A second driver opens the port, reads the truth, and can take the arm down and release it."""
    again = bench.emulator.driver(lambda: bench.now)
    again.open()
    assert np.abs(again.read().q[:5] - bench.true()).max() < 0.03
    assert again.disable() == [] and bench.torque() == OFF
    again.close()


CONNECTING = {
    "1 % of the replies lost": replies("drop", 0.01),
    "5 % of the replies damaged": replies("flip", 0.05),
    "some joints energised already": lambda bench: [
        bench.emulator.set(id, registers={"TORQUE_ENABLE": 1}) for id in (2, 4)
    ],
    "all joints energised and raised": lambda bench: [
        bench.emulator.set(id, registers={"TORQUE_ENABLE": 1}) for id in range(1, 7)
    ],
}


@pytest.mark.parametrize("fault", CONNECTING)
def test_connecting_succeeds_without_a_sag_or_a_leap(bench, fault):
    """LeRobot: 1 of 8 connects succeeds, a mixed torque state is left, or the arm sags by two degrees."""
    bench.emulator.request("pose", angles=POSE)
    CONNECTING[fault](bench)
    before = bench.true()
    for _ in range(8):
        bench.supervisor.open()
        bench.supervisor.enable(bench.now)
        assert bench.torque() == ON
        bench.run(5, setpoint=None)
        sagged = np.abs(bench.true() - before)
        assert sagged.max() < 0.03
        bench.supervisor.close()  # torque stays: the next one connects to a raised, held arm
        bench.supervisor = Supervisor(bench.driver, bench.supervisor.rest_pose)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (world(4, connected=False), "wrist_flex"),
        (lambda bench: bench.emulator.request("power", on=False), "shoulder_pan"),
        (replies("drop"), "shoulder_pan"),
        (world(3, registers={"MODEL_NUMBER": 1284}), "is model 1284"),
        (world(3, registers={"HOMING_OFFSET": 9}), "these are two arms"),
        (two_of_one_id, "shoulder_lift"),
    ],
)
def test_a_connection_that_fails_changes_no_torque_and_gives_the_port_back(bench, harm, words):
    bench.driver.bus.reply_timeout = QUICK
    bench.emulator.set(1, registers={"TORQUE_ENABLE": 1})
    harm(bench)
    before = bench.torque()
    with pytest.raises(DriverFault, match=words):
        bench.supervisor.open()
    assert bench.torque() == before and bench.supervisor.mode is Mode.OFF
    assert isinstance(bench.emulator, Direct) or not bench.driver.bus.is_open


def test_an_arm_that_falls_silent_while_torque_comes_on_is_let_go_again(bench):
    """LeRobot leaves some joints energised and others not."""
    bench.supervisor.open()
    write, count = bench.driver.bus.write, [0]

    def fail_at_the_fourth(joint, register, value):
        if register.address == 40 and value == 1:
            count[0] += 1
            if count[0] >= 4:
                raise BusTimeout([joint], "silent")
        return write(joint, register, value)

    bench.driver.bus.write = fail_at_the_fourth
    with pytest.raises(BusTimeout):
        bench.supervisor.enable(bench.now)
    assert bench.torque() == OFF and bench.supervisor.mode is Mode.OPEN


def test_an_adapter_that_comes_back_while_the_arm_is_left_ends_at_rest(bench):
    if isinstance(bench.emulator, Direct):
        pytest.skip("only a line can do this")
    bench.raise_up()
    bench.emulator.request("hangup")
    assert bench.run(1).mode is Mode.LOST and bench.height() > 0.2
    begin = bench.now

    def sleep(seconds: float) -> None:
        bench.pass_time(seconds)
        if bench.now > begin + 1.0 and not os.path.lexists(bench.emulator.port):
            bench.emulator.request("replug")

    ending = leave(bench.supervisor, "", clock=lambda: bench.now, sleep=sleep)
    assert ending.at_rest and ending.unreleased == () and bench.torque() == OFF
    assert_port_reusable(bench)


@pytest.mark.parametrize("stall", [0.2, 0.6])
def test_an_arm_is_not_let_go_because_the_computer_was_busy(bench, stall):
    """Every control period comes late: the filter starts from standstill each time, and needs more time."""
    bench.raise_up()

    def late(seconds: float) -> None:
        bench.pass_time(seconds)
        bench.pass_time(stall)

    ending = leave(bench.supervisor, "", clock=lambda: bench.now, sleep=late)
    assert ending.at_rest and ending.unreleased == () and bench.torque() == OFF


def test_a_silent_policy_is_held_then_laid_to_rest(bench):
    """LeRobot holds the last goal for ever."""
    bench.raise_up()
    bench.run(35, setpoint=None)
    assert bench.supervisor.mode is Mode.HOLD and bench.height() > 0.2
    bench.run(420, setpoint=None)
    assert bench.supervisor.mode is Mode.REST and bench.supervisor.at_rest and bench.torque() == ON


def test_a_wild_setpoint_moves_the_arm_no_faster_than_allowed(bench):
    """LeRobot: 300 degrees are accepted, and reached at 275 degrees per second."""
    bench.raise_up()
    info, path = bench.driver.info, []
    for _ in range(60):
        path.append(bench.run(1, dict.fromkeys(JOINTS, math.radians(300))).state.q)
    path = np.array(path)
    speeds = np.abs(np.diff(path, axis=0)) / DT
    assert (speeds[:, :5] < 1.3 * info.velocity[:5]).all()
    assert (path <= info.upper + 0.01).all()


def test_a_driver_that_is_forgotten_lets_nothing_fall(bench):
    """LeRobot's robot releases its arm when it is garbage collected."""
    bench.raise_up()
    bench.supervisor = None
    bench.driver.write = None
    bench.driver = None
    gc.collect()
    bench.emulator.advance(1.0)
    assert bench.torque() == ON and bench.height() > 0.2
    bench.driver = bench.emulator.driver(lambda: 0.0)


def test_a_limit_given_as_an_integer_is_a_limit(bench):
    """LeRobot's max_relative_target=10 is a TypeError at the first action."""
    bench.supervisor.filter = SafetyFilter(bench.driver.info, margin=0, following_error=1)
    bench.raise_up()
    assert bench.run(20, LEANING).mode is Mode.TRACK

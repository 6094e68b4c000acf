"""`vla robot …` from outside, on an emulated arm: what each verb does, and one sentence for what is wrong."""

import contextlib
import errno
import io
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from vla import cli
from vla.robot_drivers import Cycle, Disconnected, Mode, NotCalibrated, Recorder, State
from vla.robot_drivers.emulation import Emulator
from vla.robot_drivers.serial_port import why_not_open
from vla.robot_drivers.so101 import registers as r
from vla.robot_drivers.so101.bus import FeetechBus
from vla.robot_drivers.so101.calibrating import Sweep, centre, finish, read_calibration
from vla.robot_drivers.so101.calibration import (
    JOINTS,
    JointCalibration,
    calibration_path,
    load_calibration,
    save_calibration,
)
from vla.robot_drivers.so101.diagnosis import examine, scan_port
from vla.robot_drivers.so101.driver import so101_info
from vla.robot_drivers.wire import cycle_to_json

PATIENCE = 60.0
VLA = [sys.executable, "-P", "-m", "vla.cli"]
CALIBRATION = {
    name: JointCalibration(id, 0, offset, 1000, 3000)
    for id, (name, offset) in enumerate(zip(JOINTS, (120, -340, 77, -512, 900, -33), strict=True), 1)
}
REPLY = 1.0  # s; lockstep servos answer at once, a loaded machine takes its time


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def vla(*arguments: object) -> Done:
    """Run a command line in this process, where starting costs nothing."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(list(map(str, arguments)))
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with Emulator(
        [{"encoder": 2000.0 + it.homing_offset} for it in CALIBRATION.values()], lockstep=0.01
    ) as it:
        yield it


@pytest.fixture(autouse=True)
def factory_new(emulator) -> None:
    emulator.reset()
    emulator.request("line", mute=False)
    emulator.trace()


@pytest.fixture
def bus(emulator) -> Iterator[FeetechBus]:
    bus = FeetechBus(emulator.port, {name: id for id, name in enumerate(JOINTS, 1)}, reply_timeout=REPLY)
    bus.open()
    yield bus
    bus.close()


def found(emulator, calibration=CALIBRATION, reply_timeout=REPLY) -> dict[str, tuple[str, str]]:
    findings = examine(emulator.port, calibration, reply_timeout)
    return {finding.what: (finding.found, finding.remedy) for finding in findings}


def write(emulator, path: Path) -> Path:
    """Put the calibration into the servos, by the verb itself."""
    save_calibration(path / "source.json", CALIBRATION)
    options = ("--port", emulator.port, "--id", "mine", "--calibration-dir", path, "--timeout", REPLY)
    done = vla("robot", "calibrate", "--from-file", path / "source.json", *options)
    assert done.returncode == 0, done.stderr
    return path / "mine.json"


def test_a_calibration_goes_from_a_file_into_the_servos_and_back(emulator, tmp_path):
    mine = write(emulator, tmp_path)
    assert mine.read_bytes() == (tmp_path / "source.json").read_bytes()
    assert emulator.registers("HOMING_OFFSET") == [it.homing_offset for it in CALIBRATION.values()]
    assert emulator.registers("MAX_POSITION_LIMIT") == [3000] * 6
    assert emulator.registers("P_COEFFICIENT") == [16] * 6
    assert emulator.registers("LOCK") == [1] * 6 and emulator.registers("TORQUE_ENABLE") == [0] * 6
    emulator.request("power", on=False)
    emulator.request("power", on=True)
    back = vla(
        *("robot", "calibrate", "--from-servos", "--port", emulator.port, "--timeout", REPLY),
        *("--id", "back", "--calibration-dir", tmp_path),
    )
    assert back.returncode == 0, back.stderr
    assert (tmp_path / "back.json").read_bytes() == mine.read_bytes()
    emulator.trace()
    options = ("--port", emulator.port, "--id", "mine", "--calibration-dir", tmp_path, "--timeout", REPLY)
    vla("robot", "calibrate", "--from-file", mine, *options)
    written = {frame["parameters"][0] for frame in emulator.trace() if frame["code"] == 3}
    assert written == {r.LOCK.address}  # flash that is right already is not worn


def test_check_finds_a_sound_arm_sound_and_touches_nothing(emulator, tmp_path):
    write(emulator, tmp_path)
    emulator.trace()
    before = emulator.servos()
    options = ("--port", emulator.port, "--id", "mine", "--calibration-dir", tmp_path, "--timeout", REPLY)
    done = vla("robot", "check", "--json", *options)
    findings = {it["what"]: it for it in json.loads(done.stdout)["findings"]}
    assert list(findings)[:5] == ["port", "servos", "model", "firmware", "calibration"]
    assert all(
        not it["remedy"] for what, it in findings.items() if what != "line"
    )  # the line is the machine's
    assert {frame["code"] for frame in emulator.trace()} <= {1, 2, 0x82}  # PING, READ, SYNC_READ
    assert emulator.servos() == before


def test_scan_lists_what_answers_at_any_rate(emulator):
    emulator.set(3, registers={"BAUD_RATE": r.BAUD_RATES.index(500_000)})
    emulator.set(6, temperature=41, voltage=7.0)
    servos = scan_port(emulator.port, [1_000_000, 500_000], range(1, 8), reply_timeout=0.3)
    assert sorted((it.id, it.baudrate) for it in servos) == [
        (1, 1_000_000),
        (2, 1_000_000),
        (3, 500_000),
        (4, 1_000_000),
        (5, 1_000_000),
        (6, 1_000_000),
    ]
    last = next(it for it in servos if it.id == 6)
    assert (last.model, last.firmware, last.temperature, last.voltage) == (777, "3.10", 41, 7.0)


@pytest.mark.slow  # asks for every id at every rate
def test_scan_prints_a_table_or_json(emulator):
    options = ("--port", emulator.port, "--ids", 6, "--timeout", 0.05)
    assert "STS3215" in vla("robot", "scan", *options).stdout
    servos = json.loads(vla("robot", "scan", "--json", *options).stdout)["servos"]
    assert [it["id"] for it in servos] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("verb", ["scan", "check", "rest", "calibrate"])
def test_no_port_is_one_sentence(tmp_path, verb):
    path = save_calibration(tmp_path / "mine.json", CALIBRATION)
    more = () if verb == "scan" else ("--id", "mine", "--calibration-dir", tmp_path)
    more += ("--from-file", path) if verb == "calibrate" else ()
    done = vla("robot", verb, "--port", tmp_path / "none", *more)
    assert done.returncode == 2
    assert (
        done.stderr.count("\n") == 1 and "it does not exist" in done.stderr and "Traceback" not in done.stderr
    )


def test_a_busy_port_names_who_holds_it(emulator, bus, tmp_path):
    done = vla("robot", "scan", "--port", emulator.port)
    assert done.returncode == 2 and "holds it. End that program first." in done.stderr


def test_no_permission_comes_with_its_remedy(tmp_path):
    master, slave = os.openpty()
    port = os.ttyname(slave)
    sentence = why_not_open(port, PermissionError(errno.EACCES, "Permission denied"))
    assert "sudo usermod -aG " in sentence and f"sudo chmod a+rw {port}" in sentence
    file = tmp_path / "file"
    file.write_text("")
    assert "not a serial port" in why_not_open(str(file), OSError("x"))
    with pytest.raises(Disconnected, match="not a serial port"):
        FeetechBus(str(file), {"a": 1}).open()
    os.close(master)
    os.close(slave)


def test_a_missing_servo_is_named_with_its_cable(emulator):
    for id in (3, 4, 5, 6):
        emulator.set(id, connected=False)
    said, remedy = found(emulator, reply_timeout=0.1)["servos"]
    assert said.startswith("'elbow_flex' (servo 3), 'wrist_flex' (servo 4)")
    assert "cable that leads to servo 3" in remedy


def test_another_rate_and_no_supply_are_told_apart(emulator):
    for id in range(1, 7):
        emulator.set(id, registers={"BAUD_RATE": r.BAUD_RATES.index(115_200)})
    said, remedy = found(emulator, reply_timeout=0.1)["servos"]
    assert said == "none answers" and "6 servos answer at 115200 baud" in remedy
    emulator.request("line", mute=True)
    assert "Switch the motor supply on" in found(emulator, reply_timeout=0.02)["servos"][1]


def test_servos_that_are_not_an_so101s_are_named(emulator):
    emulator.set(2, registers={"MODEL_NUMBER": 1284})
    emulator.set(4, registers={"FIRMWARE_MINOR": 9})
    findings = found(emulator)
    assert findings["model"][0] == "'shoulder_lift' is model 1284" and "STS3215" in findings["model"][1]
    assert findings["firmware"] == (
        "3.10, 3.9",
        "LeRobot will refuse this arm: bring all servos to one version with Feetech's FD software.",
    )


def test_the_state_of_the_arm_is_judged(emulator, tmp_path):
    write(emulator, tmp_path)
    emulator.set(5, voltage=3.6, temperature=66)
    emulator.set(1, registers={"TORQUE_ENABLE": 1})
    emulator.set(2, encoder=500.0)
    findings = found(emulator)
    assert findings["supply"][0] == "3.6 to 7.4 V" and "check the supply" in findings["supply"][1]
    assert findings["temperature"][0] == "up to 66 °C" and "cool down" in findings["temperature"][1]
    assert findings["torque"][0] == "only shoulder_pan" and "vla robot rest" in findings["torque"][1]
    assert findings["status"][0] == "'wrist_roll': voltage"
    assert findings["calibration"][0] == "shoulder_lift outside their range"


def test_lost_replies_are_counted(emulator, bus):
    bus.close()
    emulator.inject("corrupt", count=-1, servo=4, instruction=0x82, probability=0.2)
    said, remedy = found(emulator, reply_timeout=0.1)["line"]
    assert int(said.split()[-2]) > 4 and "check every plug" in remedy
    emulator.request("clear")


def test_a_file_of_another_arm_is_found_out(emulator, tmp_path):
    write(emulator, tmp_path)
    other = CALIBRATION | {"gripper": JointCalibration(6, 0, -33, 1000, 2500)}
    assert (
        "'gripper' carries 3000 at address 11, the file says 2500" in found(emulator, other)["calibration"][0]
    )


def test_a_replay_says_first_what_it_would_drive(tmp_path):
    info = so101_info(CALIBRATION)
    path = tmp_path / "run.jsonl"
    with Recorder(path, info) as recorder:
        for k in range(11):
            q = np.full(6, 0.1 * k)
            state = State(0.1 * k, k, q, (True,) * 6)
            asked = dict(zip(JOINTS, q.tolist(), strict=True))
            recorder.add(cycle_to_json(Cycle(0.1 * k, Mode.TRACK, asked, q, state, True)))
    done = vla("robot", "replay", path, "--dry-run")
    assert done.returncode == 0 and "11 goals in 1.0 s" in done.stdout, done.stderr
    assert "gripper           0.000 to    1.000" in done.stdout
    done = vla("robot", "replay", tmp_path / "none.jsonl", "--dry-run")
    assert done.returncode == 2 and "cannot be read" in done.stderr


def test_an_arm_that_holds_is_not_calibrated(emulator, tmp_path):
    emulator.set(2, registers={"TORQUE_ENABLE": 1})
    path = save_calibration(tmp_path / "c.json", CALIBRATION)
    done = vla("robot", "calibrate", "--port", emulator.port, "--from-file", path, "--timeout", REPLY)
    assert done.returncode == 2 and "vla robot rest" in done.stderr
    assert emulator.registers("HOMING_OFFSET") == [0] * 6


def test_without_a_terminal_the_wizard_says_what_works_instead(emulator):
    done = vla("robot", "calibrate", "--port", emulator.port)  # pytest has none
    assert done.returncode == 2 and "--from-file FILE or --from-servos" in done.stderr
    done = vla("robot", "calibrate", "--from-servos", "--from-file", "x")
    assert done.returncode == 2 and "either" in done.stderr


def test_servos_of_the_factory_carry_no_calibration(emulator, bus):
    with pytest.raises(NotCalibrated, match=r"Servo 1 \('shoulder_pan'\) carries no calibration"):
        read_calibration(bus)


def test_the_wizard_finds_middle_and_ranges(emulator, bus):
    """The joints stand at 2000 + offset: that becomes step 2047, and ±900 about it the range."""
    offsets = centre(bus)
    assert offsets == {name: 2000 + it.homing_offset - 2047 for name, it in CALIBRATION.items()}
    sweep = Sweep()
    for share in (0, -1, 1):
        for id, it in enumerate(CALIBRATION.values(), 1):
            emulator.set(id, encoder=2000.0 + it.homing_offset + 900 * share)
        sweep.look(bus)
        if share == 0:
            assert sweep.unmoved == [name for name in JOINTS if name != "wrist_roll"]
    calibration = finish(bus, offsets, sweep)
    for name, it in calibration.items():
        limits = (0, 4095) if name == "wrist_roll" else (1147, 2947)
        assert (it.range_min, it.range_max, it.homing_offset) == (*limits, offsets[name])


def test_the_wizard_refuses_a_joint_that_was_forgotten_or_ran_out_of_its_encoder(emulator, bus):
    offsets = centre(bus)
    sweep = Sweep()
    sweep.look(bus)
    with pytest.raises(NotCalibrated, match=r"shoulder_pan, shoulder_lift.* were hardly moved"):
        finish(bus, offsets, sweep)
    sweep.low.update(dict.fromkeys(JOINTS, 1000), gripper=-20)
    sweep.high.update(dict.fromkeys(JOINTS, 3000))
    with pytest.raises(NotCalibrated, match="'gripper' went past the end"):
        finish(bus, offsets, sweep)


@pytest.mark.slow  # a person's pace
def test_the_wizard_at_a_terminal(emulator, tmp_path):
    """A scripted person: presses ENTER in the middle, moves every joint, presses ENTER again."""
    master, slave = os.openpty()
    options = ("--port", emulator.port, "--id", "hand", "--calibration-dir", tmp_path, "--timeout", REPLY)
    command = [*VLA, "robot", "calibrate", *map(str, options)]
    wizard = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    read_until(master, b"press ENTER.")
    os.write(master, b"\n")
    read_until(master, b"then press ENTER.")
    for share in (-1, 1):
        for id, it in enumerate(CALIBRATION.values(), 1):
            emulator.set(id, encoder=2000.0 + it.homing_offset + 900 * share)
        read_until(master, b"shoulder_pan %d " % (2047 + 900 * share))
        read_until(master, b"shoulder_pan %d " % (2047 + 900 * share))  # a whole look since
    os.write(master, b"\n")
    read_until(master, b"is in ")
    assert wizard.wait(PATIENCE) == 0
    os.close(master)
    calibration = load_calibration(tmp_path / "hand.json")
    assert calibration["gripper"].range_min == 1147 and calibration["wrist_roll"].range_max == 4095
    assert emulator.registers("MIN_POSITION_LIMIT") == [1147] * 4 + [0, 1147]


def read_until(master: int, words: bytes) -> None:
    heard, end = b"", time.monotonic() + PATIENCE
    while words not in heard:
        ready, _, _ = select.select([master], [], [], 1.0)
        heard += os.read(master, 4096) if ready else b""
        assert time.monotonic() < end, heard[-2000:]


@pytest.mark.slow  # LeRobot's imports
@pytest.mark.parametrize("name", ["HF_HOME", "HF_LEROBOT_HOME", "HF_LEROBOT_CALIBRATION", "XDG_CACHE_HOME"])
def test_calibrations_are_where_lerobot_keeps_them(tmp_path, name):
    script = (
        "from lerobot.robots.so_follower import SO101Follower;"
        "from lerobot.utils.constants import HF_LEROBOT_CALIBRATION, ROBOTS;"
        "from vla.robot_drivers.so101.calibration import calibration_path;"
        "print(HF_LEROBOT_CALIBRATION / ROBOTS / SO101Follower.name / 'x.json', calibration_path('x'))"
    )
    names = ("HF_HOME", "HF_LEROBOT_HOME", "HF_LEROBOT_CALIBRATION", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    environment[name] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    theirs, ours = done.stdout.split()
    assert theirs == ours and theirs.startswith(str(tmp_path))


def test_a_calibration_has_a_name_and_a_folder(tmp_path):
    assert calibration_path("arm", tmp_path) == tmp_path / "arm.json"


@pytest.mark.slow  # MuJoCo, in real time
def test_an_emulated_arm_is_served_until_it_is_interrupted(tmp_path):
    link = tmp_path / "arm"
    options = ("--link", link, "--calibration-dir", tmp_path, "--id", "emulated", "--json")
    command = [*VLA, "robot", "emulate", "--so101", *map(str, options)]
    served = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said = json.loads(served.stdout.readline())
    assert said["port"] == str(link) and said["calibration"] == str(tmp_path / "emulated.json")
    arm = ("--port", link, "--id", "emulated", "--calibration-dir", tmp_path)
    done = vla("robot", "rest", *arm, "--timeout", 0.3)
    assert done.returncode == 0 and "at rest and released" in done.stdout, done.stderr
    other = vla("robot", "emulate", "--so101", "--link", link, "--calibration-dir", tmp_path)
    assert other.returncode == 2 and "cannot be linked" in other.stderr
    served.terminate()
    assert served.wait(PATIENCE) == 0 and not os.path.lexists(link)
    served.stdout.close()
    assert vla("robot", "emulate").returncode == 2

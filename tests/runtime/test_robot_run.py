"""`vla run` on the emulated arm: real processes, a serial port, cameras that draw, a real (untrained) policy.

After every fault three things are asserted: torque vector, collapsed or not (the arm stands at its rest
pose), port reusable.
"""

import contextlib
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from arm_bench import (
    HEIGHT,
    WIDTH,
    FakeCamera,
    arm_contract,
    raised,
    save_arm_expert,
    save_untrained_arm_policy,
    sway_server,
)
from port_wait import opens
from rich.console import Console

from vla.errors import UserError
from vla.experts.bank_folder import BankFolder
from vla.robot_drivers import Arm, ArmConfig, Mode, SupervisorConfig
from vla.robot_drivers.emulation import Emulator
from vla.robot_drivers.recorder import read_record
from vla.robot_drivers.so101.driver import so101_info
from vla.runtime.robot import run as module
from vla.runtime.robot.run import RunConfig, run_robot
from vla.serving.client import RemotePolicy

VLA = Path(sys.executable).with_name("vla")
PATIENCE = 90.0  # s, for a loaded machine
# Emulator, arm and cameras are processes of a machine that may be busy: nothing is late that is only slow.
OPTIONS = {"reply_timeout": 1.0, "dead_after": 6.0}
QUICK = SupervisorConfig(rest_speed=0.8, sample_patience=3.0, lost_after=5.0, stale_hold=2.0, stale_rest=20.0)


@pytest.fixture(scope="module")
def emulator():
    with Emulator(tabletop=0, cameras=(HEIGHT, WIDTH)) as emulator:
        yield emulator


@pytest.fixture(autouse=True)
def at_home(emulator):
    """Every test finds a healthy arm at its rest pose, without torque."""
    emulator.reset()


@pytest.fixture(scope="module")
def info(emulator):
    return so101_info(emulator.calibration)


@pytest.fixture(scope="module")
def contract(emulator):
    return arm_contract(emulator.calibration, rate=10.0)  # a loaded machine keeps up with that


@pytest.fixture(scope="module")
def server(contract):
    """A policy behind a server in this process, so that the programs under test start quickly."""
    with sway_server(contract) as address:
        yield address


def config(emulator, server, **changes) -> RunConfig:
    address = f"emulated:{emulator.camera_address}"
    return RunConfig(
        **{
            "task": "wave",
            "port": emulator.port,
            "calibration_dir": emulator.calibration_file.parent,
            "server": server,
            "cameras": (f"top={address}", f"wrist={address}"),
            "driver_options": json.dumps(OPTIONS),
            "supervisor": QUICK,
            "max_frame_age": 8.0,
            "soft_start": 0.5,
        }
        | changes
    )


def until(done, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_left_at_rest(emulator, info, limp=None) -> None:
    """Torque vector, collapsed or not, port reusable. The joint `limp` hangs where gravity takes it."""
    assert emulator.registers("TORQUE_ENABLE") == [0] * 6
    settings = ArmConfig(
        "so101", {"port": emulator.port, "calibration": str(emulator.calibration_file)} | OPTIONS
    )
    with Arm(settings) as again:
        until(lambda: opens(again))  # the port is free a moment after the last joint was released
        cycle = again.latest()
        assert cycle.mode is Mode.OPEN
        gap = np.abs(cycle.state.q - np.array(info.rest)) / (info.upper - info.lower)
        away = {name for name, it in zip(info.joint_names, gap, strict=True) if it > 0.04}
        assert away <= {limp}, f"the arm is not at rest: {gap}"


def is_up(emulator, info) -> bool:
    """Whether the arm has left its rest pose under the policy's command."""
    lift = emulator.servos()[2]["registers"]["PRESENT_POSITION"]
    calibration = emulator.calibration["shoulder_lift"]
    share = (lift - calibration.range_min) / (calibration.range_max - calibration.range_min)
    return share > 0.15


@contextlib.contextmanager
def when_up(emulator, info, act):
    """Do `act` from another thread as soon as the arm is up; fail if it never was."""
    done, over = threading.Event(), threading.Event()

    def watch():
        until(lambda: over.is_set() or is_up(emulator, info))
        if not over.is_set():
            act()
            done.set()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
        thread.join(PATIENCE)
    finally:  # the emulator is steered from one thread at a time
        over.set()
        thread.join()
    assert done.is_set(), "the arm never came up"


def test_a_checkpoint_drives_the_arm_and_leaves_it_at_rest(emulator, info, contract, tmp_path, capsys):
    record = tmp_path / "record"
    policy = save_untrained_arm_policy(tmp_path / "policy", contract)
    settings = config(emulator, None, checkpoint=policy, device="cpu", seconds=8.0, record=record)
    run_robot(settings)
    said = capsys.readouterr().err
    assert "The 8 s of this run are over. The arm is at rest and released." in said
    assert "pre-flight" in said and "fails" not in said
    assert_left_at_rest(emulator, info)
    cycles = read_record(record / "arm.jsonl")
    away = np.abs(cycles.measured - raised(info)) / (info.upper - info.lower)
    assert np.nanmin(away.max(axis=1)) < 0.1, "it went where the policy is"
    assert np.nanmax(away[-1]) > 0.2, "and back"
    summary = json.loads((record / "run.json").read_text())
    assert summary["end"] == {"reason": "The 8 s of this run are over.", "failed": False}
    assert summary["policy"]["checkpoint"]["sha256"] and summary["queries"] > 1
    answers = [json.loads(line) for line in (record / "policy.jsonl").read_text().splitlines()]
    assert np.array(answers[0]["chunk"]).shape == (16, 6) and len(answers[0]["state"]) == 6
    with pytest.raises(UserError, match="holds something already"):
        run_robot(settings)


def test_a_bank_drives_the_arm_with_the_expert_that_the_task_means(
    emulator, info, contract, tmp_path, capsys
):
    base = save_untrained_arm_policy(tmp_path / "base", contract)
    experts = [
        save_arm_expert(tmp_path / name, base, seed, (task,))
        for seed, (name, task) in enumerate({"place": "put the cube away", "wave": "wave a hand"}.items())
    ]
    BankFolder.create(tmp_path / "bank", base, experts)
    record = tmp_path / "record"
    settings = config(emulator, None, checkpoint=tmp_path / "bank", device="cpu", task="wave a hand")
    run_robot(replace(settings, seconds=8.0, record=record))
    said = " ".join(capsys.readouterr().err.split())
    assert "'wave' acts (language" in said and "at rest and released" in said
    assert_left_at_rest(emulator, info)
    summary = json.loads((record / "run.json").read_text())
    assert summary["policy"]["choice"]["expert"] == "wave" and summary["queries"] > 1
    emulator.trace()
    with pytest.raises(UserError, match="cannot tell whether"):
        run_robot(replace(settings, task_router_margin=2.5))
    assert emulator.trace() == [], "not even looked at"


def test_a_dry_run_shows_what_it_would_send_and_touches_nothing(emulator, info, server, capsys):
    emulator.trace()
    run_robot(config(emulator, server, dry_run=True, seconds=1.5))
    written = {it["code"] for it in emulator.trace()} & {3, 0x83}
    assert written == set(), "neither WRITE nor SYNC_WRITE"
    said = capsys.readouterr().err
    assert "shoulder_pan" in said and said.count("°") > 20
    assert said.rstrip().endswith("Nothing has moved.")
    assert_left_at_rest(emulator, info)


def test_a_workspace_is_said_before_the_start_and_kept(emulator, info, server, capsys):
    low_ceiling = (-0.5, 0.5, -0.5, 0.5, 0.0, 0.1)  # the policy wants the gripper up, at 0.2 m
    run_robot(config(emulator, server, dry_run=True, seconds=3.0, workspace=low_ceiling))
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"gripper at x (19|20)\d, y -?\d, z [2-4]\d mm", said), said
    assert "shoulder_lift: workspace" in said and "gripper: workspace" not in said
    with pytest.raises(UserError, match="empty or too thin along z"):
        run_robot(config(emulator, server, workspace=(*low_ceiling[:4], 0.2, 0.1)))


def heat(emulator):
    emulator.set(4, temperature=85)


def unplug(emulator):
    emulator.request("hangup")
    time.sleep(1.0)
    emulator.request("replug")


def silence(emulator):
    emulator.request("line", mute=True)
    time.sleep(8.0)
    emulator.request("line", mute=False)


@pytest.mark.parametrize(
    ("fault", "words", "limp"),
    [
        # A servo that is too hot lets go on its own: the others carry the arm down.
        pytest.param(heat, "Joint 'wrist_flex' reports overheating", "wrist_flex", id="overheating"),
        pytest.param(unplug, "The serial port|adapter", None, id="adapter unplugged"),
        pytest.param(silence, "No answer for", None, id="bus silent", marks=pytest.mark.slow),
    ],
)
def test_a_fault_of_the_arm_is_named_and_the_arm_ends_at_rest(emulator, info, server, fault, words, limp):
    with when_up(emulator, info, lambda: fault(emulator)), pytest.raises(UserError, match=words) as end:
        run_robot(config(emulator, server, seconds=PATIENCE))
    assert "\n" not in str(end.value)
    assert_left_at_rest(emulator, info, limp)


def test_a_camera_that_blocks_stops_the_policy_and_not_the_arm(emulator, info, server, monkeypatch, tmp_path):
    fakes = {"top": FakeCamera(), "wrist": FakeCamera()}
    monkeypatch.setattr(module, "make_cameras", lambda options, contract: fakes)
    record, blocked = tmp_path / "record", []

    def block():
        fakes["wrist"].stuck = True
        blocked.append(time.monotonic())

    with (
        when_up(emulator, info, block),
        pytest.raises(UserError, match=r"Camera 'wrist' has given no picture for .* at rest and released"),
    ):
        run_robot(config(emulator, server, seconds=PATIENCE, max_frame_age=3.0, record=record))
    fakes["wrist"].stuck = False
    assert_left_at_rest(emulator, info)
    assert json.loads((record / "run.json").read_text())["end"]["failed"]
    since = read_record(record / "arm.jsonl").times - blocked[0]
    assert ((since > 0) & (since < 3.0)).sum() > 10, "the bus went on while the camera blocked"


@pytest.mark.slow
def test_a_policy_that_breaks_is_raised_and_the_arm_ends_at_rest(emulator, info, server, monkeypatch, capsys):
    act, broken = RemotePolicy.act, threading.Event()

    def break_down(self, *observation):
        if broken.is_set():
            raise ZeroDivisionError("a bug in the policy")
        return act(self, *observation)

    monkeypatch.setattr(RemotePolicy, "act", break_down)
    with when_up(emulator, info, broken.set), pytest.raises(ZeroDivisionError):
        run_robot(config(emulator, server, seconds=PATIENCE))
    assert "The run failed. Bringing the arm to rest." in capsys.readouterr().err
    assert_left_at_rest(emulator, info)


def command(emulator, server, *more) -> list[str]:
    address = f"emulated:{emulator.camera_address}"
    supervisor = [
        word
        for name, value in vars(QUICK).items()
        if value != getattr(SupervisorConfig(), name)
        for word in (f"--supervisor.{name.replace('_', '-')}", str(value))
    ]
    return [
        str(VLA), "run", "--task", "wave", "--port", emulator.port,
        "--calibration-dir", str(emulator.calibration_file.parent), "--server", server,
        "--driver-options", json.dumps(OPTIONS), "--max-frame-age", "8", "--soft-start", "0.5", *supervisor,
        "--cameras", f"top={address}", f"wrist={address}", *more,
    ]  # fmt: skip


def start(emulator, server, *more) -> subprocess.Popen:
    return subprocess.Popen(
        command(emulator, server, *more), stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.parametrize(
    "signum",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_an_interrupted_run_ends_at_rest_with_code_0(emulator, info, server, signum):
    process = start(emulator, server)
    until(lambda: is_up(emulator, info))
    process.send_signal(signum)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert "The run was interrupted. The arm is at rest and released." in " ".join(said.split())
    assert_left_at_rest(emulator, info)


@pytest.mark.slow
def test_a_run_that_is_killed_ends_at_rest(emulator, info, server):
    process = start(emulator, server)
    until(lambda: is_up(emulator, info))
    process.kill()
    process.communicate()
    until(lambda: emulator.registers("TORQUE_ENABLE") == [0] * 6)
    assert_left_at_rest(emulator, info)


SERVER = """
import asyncio, sys
from vla.serving.server import PolicyServer, Served
sys.path.append(sys.argv[1])
from arm_bench import SwayPolicy, arm_contract
from vla.robot_drivers.so101.calibration import load_calibration
contract = arm_contract(load_calibration(sys.argv[2]), rate=10.0)
server = PolicyServer(Served(lambda: SwayPolicy(contract), contract, {}), token="sesame")
asyncio.run(server.run("127.0.0.1", 0, asyncio.Event(), lambda port: print(port, flush=True)))
"""


def test_a_server_that_is_lost_ends_the_run_at_rest(emulator, info):
    arguments = [str(Path(__file__).parent), str(emulator.calibration_file)]
    server = subprocess.Popen(
        [sys.executable, "-P", "-c", SERVER, *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        address = f"ws://127.0.0.1:{server.stdout.readline().strip()}"
        with (
            when_up(emulator, info, server.kill),
            pytest.raises(UserError, match=r"The connection to ws://.* is lost.*at rest and released"),
        ):
            run_robot(config(emulator, address, token="sesame", seconds=PATIENCE))
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    assert_left_at_rest(emulator, info)


def test_preflight_reports_everything_at_once_and_moves_nothing(emulator, tmp_path, capsys, monkeypatch):
    emulator.trace()
    other = arm_contract(emulator.calibration, cameras=("top", "side"), rate=400.0)
    wrong = config(
        emulator,
        "filled in below",
        joint_units="si",
        cameras=(f"wrist=emulated:{emulator.camera_address}", "top=/dev/video_none"),
        record=tmp_path / "record",
    )
    monkeypatch.setattr(module, "CAMERA_TIMEOUT", 3.0)
    with (
        sway_server(other) as address,
        pytest.raises(UserError, match="nothing has moved: range of actions, control rate") as refusal,
    ):
        run_robot(replace(wrong, server=address))
    assert all(f"camera {name}" in str(refusal.value) for name in ("side", "top", "wrist"))
    assert not (tmp_path / "record").exists(), "the record of nothing makes room for the next attempt"
    said = " ".join(capsys.readouterr().err.split())
    for words in ("--joint-units", "--cameras side=0", "Train on data", "lerobot-find-cameras"):
        assert words.replace(" ", "") in said.replace(" ", "").replace("│", ""), said
    assert {it["code"] for it in emulator.trace()} & {3, 0x83} == set()
    assert emulator.registers("TORQUE_ENABLE") == [0] * 6


def test_the_terminal_shows_rates_latency_servos_and_faults(emulator, info, server, monkeypatch):
    from vla.runtime.robot.terminal_view import TerminalView

    screen, pictures = io.StringIO(), []
    tick = TerminalView.tick

    def look(self):
        if self._loop.status.queries >= 2 and not pictures:
            probe = Console(file=io.StringIO(), width=140)
            probe.print(self.picture())
            pictures.append(probe.file.getvalue())
        tick(self)

    monkeypatch.setattr(TerminalView, "tick", look)
    monkeypatch.setattr(
        module, "Console", lambda **options: Console(file=screen, force_terminal=True, width=140)
    )
    run_robot(config(emulator, server, seconds=4.0))
    shown = pictures[0]
    for words in ("task", "wave", "of 10 Hz", "of 100 Hz", "missed", "p99", "camera top", "camera wrist"):
        assert words in shown
    for words in ("shoulder_pan", "gripper", "°C", "no fault", "Ctrl-C brings the arm to rest"):
        assert words in shown
    assert "at rest and released" in " ".join(screen.getvalue().split())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"server": None}, "either --checkpoint DIR or --server"),
        ({"checkpoint": Path("x")}, "either --checkpoint DIR or --server"),
        ({"server": "ws://127.0.0.1:1"}, "There is no policy server at"),
        ({"cameras": ("top",)}, "is not NAME=SOURCE"),
        ({"cameras": ("top={",)}, "is not JSON"),
        ({"scheduler": "realtime"}, "Did you mean 'real_time'"),
        ({"horizon": 99}, "cannot execute 99 actions"),
        ({"driver_options": "["}, "--driver-options is not JSON"),
        ({"driver_options": "[]"}, "is no JSON object"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(emulator, server, changes, words):
    with pytest.raises(UserError, match=words):
        run_robot(config(emulator, **{"server": server} | changes))


def test_the_computer_beside_the_arm_needs_no_torch_for_a_policy_elsewhere():
    program = (
        "import sys, vla.runtime.robot.run, vla.serving.client;"
        "print(sorted({'torch', 'lerobot', 'transformers', 'mujoco'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

"""Control-loop rate and jitter on an emulated SO101, ours beside LeRobot's, on the same serial port.

Both sides do one observation and one command per period. Ours is the process that `vla run` drives: whole
status block, safety filter, absolute deadlines. LeRobot's is `SO101Follower.get_observation`, `send_action`
and `precise_sleep` for what is left of the period, as `lerobot-record` does it. The sides take turns in one
run, so that whatever else the machine does meets both. The servos are emulated without masses, so that their
process costs little; adapter and wire take the time of an adapter with 1 ms of turn-around.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vla.robot_drivers import Arm, ArmConfig, DriverFault, Mode, read_record
from vla.robot_drivers.emulation import Emulator
from vla.robot_drivers.so101.calibration import JOINTS, JointCalibration, save_calibration

CALIBRATION = {name: JointCalibration(id, 0, 0, 1000, 3000) for id, name in enumerate(JOINTS, 1)}
TURNAROUND = 0.001  # s
PATIENCE = 40


def run(
    seconds: float = 5.0, turns: int = 3, rates: tuple[float, ...] = (50.0, 100.0)
) -> list[dict[str, Any]]:
    """Run both loops for `seconds` at every rate, `turns` times; return the medians over the turns."""
    rows = []
    with arm_on_a_port() as (port, folder):
        for rate in rates:
            ours, theirs = [], []
            for _ in range(turns):
                ours.append(our_loop(port, folder, rate, seconds))
                theirs.append(lerobot_loop(port, folder, rate, seconds))
            rows += compare(rate, ours, theirs)
    return rows


@contextlib.contextmanager
def arm_on_a_port() -> Iterator[tuple[str, Path]]:
    """Yield the port of a calibrated arm, and the folder of its calibration ``arm.json``."""
    limits = {"MIN_POSITION_LIMIT": 1000, "MAX_POSITION_LIMIT": 3000}
    with Emulator([{"encoder": 2000.0}] * 6, turnaround=TURNAROUND) as emulator:
        for id in range(1, 7):
            emulator.set(id, registers=limits)
        with tempfile.TemporaryDirectory() as folder:
            save_calibration(Path(folder) / "arm.json", CALIBRATION)
            yield emulator.port, Path(folder)


def our_loop(port: str, folder: Path, rate: float, seconds: float) -> np.ndarray:
    """Return the times (s) at which control periods began, in the arm's own process."""
    arguments = {"port": port, "calibration": str(folder / "arm.json"), "reply_timeout": 0.05}
    record = folder / f"{time.monotonic_ns()}.jsonl"
    with Arm(ArmConfig("so101", arguments, rate=rate, record=record)) as arm:
        arm.open()
        arm.enable()
        begin = time.monotonic()
        while (now := time.monotonic()) < begin + seconds:
            arm.setpoint(dict.fromkeys(JOINTS, wave(now - begin)))
            time.sleep(1 / rate)
    return np.array([it.time for it in read_record(record).cycles if it.mode is Mode.TRACK])


def lerobot_loop(port: str, folder: Path, rate: float, seconds: float) -> np.ndarray:
    """Return the times (s) at which LeRobot's control periods began."""
    from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig
    from lerobot.utils.robot_utils import precise_sleep

    robot = SO101Follower(SO101FollowerConfig(port=port, id="arm", calibration_dir=folder))
    connect(robot)
    times, begin = [], time.perf_counter()
    while (now := time.perf_counter()) < begin + seconds:
        times.append(now)
        with contextlib.suppress(ConnectionError):  # a lost reply costs a period, not the benchmark
            robot.get_observation()
            angle = float(np.degrees(wave(now - begin)))
            robot.send_action({f"{name}.pos": 50.0 if name == "gripper" else angle for name in JOINTS})
        precise_sleep(max(1 / rate - (time.perf_counter() - now), 0.0))
    with contextlib.suppress(ConnectionError):  # the next side takes the arm over as it is
        robot.disconnect()
    return np.array(times)


def connect(robot: Any) -> None:
    """Connect with a longer patience for replies than LeRobot's 50 ms, which a busy machine may overrun.

    The loop that is measured has LeRobot's own again.
    """
    port = robot.bus.port_handler
    set_timeout = port.setPacketTimeout

    def patient(length: int) -> None:
        set_timeout(length)
        port.packet_timeout *= PATIENCE

    port.setPacketTimeout = patient
    try:
        robot.connect(calibrate=False)
    except (ConnectionError, RuntimeError) as error:
        raise DriverFault(f"LeRobot could not connect to the emulated arm: {error}") from None
    finally:
        port.setPacketTimeout = set_timeout


def wave(seconds: float) -> float:
    """Radians, a slow swing."""
    return 0.3 * float(np.sin(2 * np.pi * 0.25 * seconds))


def compare(rate: float, ours: list[np.ndarray], theirs: list[np.ndarray]) -> list[dict[str, Any]]:
    """Return one row per figure: achieved rate, jitter (|period − wanted|) p50 and p99, longest period."""
    figures = {
        ("rate achieved", "Hz"): lambda periods: 1 / periods.mean(),
        ("jitter p50", "ms"): lambda periods: 1e3 * np.percentile(np.abs(periods - 1 / rate), 50),
        ("jitter p99", "ms"): lambda periods: 1e3 * np.percentile(np.abs(periods - 1 / rate), 99),
        ("longest period", "ms"): lambda periods: 1e3 * periods.max(),
    }
    rows = []
    for (name, unit), figure in figures.items():
        value, baseline = (
            statistics.median(float(figure(np.diff(times))) for times in side) for side in (ours, theirs)
        )
        rows.append(
            {
                "name": f"{name} at {rate:g} Hz",
                "value": value,
                "unit": unit,
                "baseline": "SO101Follower",
                "baseline_value": baseline,
                "ratio": value / baseline if baseline else None,
            }
        )
    return rows

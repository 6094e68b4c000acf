"""Success of a policy on the emulated SO101 through the whole stack, beside the same episodes without it.

Every trial is a `vla run` of its own: its serial port is the emulated bus, its cameras are drawn, its arm
ends at rest. The baseline is `vla eval` of the same checkpoint on the same episodes, where the policy answers
in no time and nothing is a process of its own. In lockstep the arm's goals advance the world, in real time
the clock does, whatever the machine can keep up with.

Last come trials during which the bus is disturbed in five ways, one after the other, all of which a run has
to survive: it goes on to its end and leaves the arm at rest.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.progress import track

from vla.errors import UserError
from vla.evaluation.statistics import wilson_interval
from vla.robot_drivers.emulation import Emulator
from vla.sim.tabletop.simulation import CONTROL_RATE, CYCLES
from vla.sim.tabletop.suite import STEP_LIMIT, SUITE

VLA = Path(sys.executable).with_name("vla")
INSTRUCTION = "pick up the cube and place it in the bowl"
SOFT_START = 2.0  # s, as `vla run` comes up to speed
PATIENCE = 120.0  # s on the clock for a run to begin, or to end
LOOK = 0.1  # s between two looks at the table
FRAME_AGE = 1.0  # s; cameras drawn in software lag on a busy machine
AT_REST = 0.05  # of a joint's range

#: What happens to the bus, and the seconds of the world between two disturbances.
DISTURBANCES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("corrupt", {"count": 10}),
    ("drop", {"count": 3}),
    ("noise", {"count": 10}),
    ("delay", {"count": 5, "seconds": 0.01}),
    ("lose_byte", {"count": 3}),
)
BETWEEN = 1.5


@dataclass(frozen=True)
class Trial:
    """What became of one run: was the task solved, did `vla run` end well, was the arm left at rest."""

    solved: bool
    code: int
    at_rest: bool
    said: str


def run(
    checkpoint: Path,
    trials: int = 20,
    worlds: tuple[Literal["lockstep", "real time", "disturbed"], ...] = (
        "lockstep",
        "real time",
        "disturbed",
    ),
    image_size: int = 128,
    disturbed_trials: int = 5,
) -> list[dict[str, Any]]:
    """Evaluate `checkpoint` on `trials` episodes per world, with cameras of `image_size` pixels."""
    direct = evaluate(checkpoint, trials)
    rows = []
    for world in worlds:
        seeds = list(direct)[: disturbed_trials if world == "disturbed" else trials]
        done = list(run_trials(checkpoint, seeds, world, image_size))
        rows += compare(world, done, [direct[seed] for seed in seeds])
    return rows


def evaluate(checkpoint: Path, trials: int) -> dict[int, bool]:
    """Return success by the episode's seed, in the simulation that `vla eval` steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(VLA), "eval", "--checkpoint", str(checkpoint), "--suite", SUITE]
        command += ["--episodes-per-task", str(trials), "--out", f"{folder}/eval"]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"`vla eval` failed on {checkpoint}; see above.")
        lines = (Path(folder) / "eval" / "episodes.jsonl").read_text().splitlines()
    return {episode["seed"]: episode["success"] for episode in map(json.loads, lines)}


def run_trials(checkpoint: Path, seeds: Sequence[int], world: str, image_size: int) -> Iterator[Trial]:
    """Yield one trial per seed."""
    lockstep = 1 / (CONTROL_RATE * CYCLES) if world == "lockstep" else None
    with Emulator(tabletop=0, lockstep=lockstep, cameras=(image_size, image_size)) as emulator:
        for seed in track(seeds, description=world):
            emulator.reset()
            emulator.arrange(seed)
            disturb = disturbances(emulator) if world == "disturbed" else None
            yield run_trial(checkpoint, emulator, disturb)


def run_trial(checkpoint: Path, emulator: Emulator, disturb: Callable[[float], None] | None) -> Trial:
    """Start `vla run`, end it when the task is solved or its time is over, and look at what it leaves."""
    cameras = [f"{name}=emulated:{emulator.camera_address}" for name in ("top", "wrist")]
    command = [str(VLA), "run", "--checkpoint", str(checkpoint), "--task", INSTRUCTION]
    command += ["--port", emulator.port, "--calibration-dir", str(emulator.calibration_file.parent)]
    command += ["--soft-start", str(SOFT_START), "--max-frame-age", str(FRAME_AGE), "--cameras", *cameras]
    began = emulator.registers("PRESENT_POSITION")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        solved = watch(process, emulator, disturb)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return Trial(solved, process.returncode, is_at_rest(emulator, began), said)


def watch(process: subprocess.Popen, emulator: Emulator, disturb: Callable[[float], None] | None) -> bool:
    """Return whether the task was solved before its time was over or the run ended."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not any(emulator.registers("TORQUE_ENABLE")):
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK)
    limit, began = STEP_LIMIT / CONTROL_RATE + SOFT_START, emulator.look()["time"]
    while process.poll() is None:
        seen = emulator.look()
        if seen["success"] or seen["time"] - began > limit:
            return seen["success"]
        if disturb is not None:
            disturb(seen["time"] - began)
        time.sleep(LOOK)
    return False


def disturbances(emulator: Emulator) -> Callable[[float], None]:
    """Return what to call with the seconds since the start, to disturb the bus at its times."""
    due = list(DISTURBANCES)

    def disturb(elapsed: float) -> None:
        number = len(DISTURBANCES) - len(due)
        if due and elapsed > SOFT_START + number * BETWEEN:
            kind, which = due.pop(0)
            emulator.inject(kind, **which)

    return disturb


def is_at_rest(emulator: Emulator, began: Sequence[int]) -> bool:
    """Return whether no servo has torque and the arm is back where it `began`, in steps of the encoders."""
    ranges = [joint.range_max - joint.range_min for joint in emulator.calibration.values()]
    gap = np.abs(np.subtract(emulator.registers("PRESENT_POSITION"), began)) / ranges
    return bool(gap.max() < AT_REST and not any(emulator.registers("TORQUE_ENABLE")))


def compare(world: str, trials: Sequence[Trial], direct: Sequence[bool]) -> list[dict[str, Any]]:
    """Return success with its interval beside `vla eval`, and how many runs ended well."""
    for trial in trials:
        if trial.code or not trial.at_rest:
            words = " ".join(trial.said.split())[-400:]
            print(f"{world}: exit code {trial.code}, at rest {trial.at_rest}: {words}")
    solved, count = sum(trial.solved for trial in trials), len(trials)
    low, high = wilson_interval(solved, count)
    share = sum(direct) / count
    well = sum(trial.code == 0 and trial.at_rest for trial in trials)
    return [
        {
            "name": f"success, {world}, {solved} of {count} (95 %: {100 * low:.1f}-{100 * high:.1f})",
            "value": 100 * solved / count,
            "unit": "%",
            "baseline": "vla eval",
            "baseline_value": 100 * share,
            "ratio": solved / count / share if share else None,
        },
        {
            "name": f"ended at rest with code 0, {world}",
            "value": float(well),
            "unit": f"of {count}",
            "baseline": None,
            "baseline_value": None,
            "ratio": None,
        },
    ]

"""LeRobot's `lerobot-rollout`, unmodified, runs our policy on our robot type: both are plug-ins to it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from arm_bench import HEIGHT, WIDTH, arm_contract, raised, save_untrained_arm_policy

from vla.robot_drivers.emulation import Emulator
from vla.robot_drivers.recorder import read_record
from vla.robot_drivers.so101.driver import VELOCITY, so101_info


@pytest.mark.slow  # LeRobot's imports, MuJoCo and its cameras in real time
def test_lerobot_rollout_drives_the_arm_with_our_policy_and_leaves_it_at_rest(tmp_path):
    camera = "{type: cogmerge_emulated, address: %s, camera: %s, width: %d, height: %d, fps: 10}"
    with Emulator(tabletop=0, cameras=(HEIGHT, WIDTH)) as emulator:
        policy = save_untrained_arm_policy(tmp_path / "policy", arm_contract(emulator.calibration, rate=10.0))
        cameras = ", ".join(
            f"{name}: {camera % (emulator.camera_address, name, WIDTH, HEIGHT)}" for name in ("top", "wrist")
        )
        command = [
            Path(sys.executable).parent / "lerobot-rollout",
            *("--robot.type=cogmerge_so101", f"--robot.port={emulator.port}"),
            f"--robot.id={emulator.calibration_file.stem}",
            f"--robot.calibration_dir={emulator.calibration_file.parent}",
            "--robot.driver_options={reply_timeout: 1.0, dead_after: 6.0}",
            *("--robot.supervisor.sample_patience=3.0", "--robot.supervisor.lost_after=5.0"),
            *("--robot.max_frame_age=8.0", f"--robot.record={tmp_path / 'run.jsonl'}"),
            "--robot.cameras={" + cameras + "}",
            *(f"--policy.path={policy}", "--device=cpu", "--task=wave", "--fps=10", "--duration=6"),
            "--play_sounds=false",
        ]
        done = subprocess.run(
            command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert "The arm is at rest and released." in done.stderr + done.stdout
        assert emulator.registers("TORQUE_ENABLE") == [0] * 6
        info = so101_info(emulator.calibration)
    run = read_record(tmp_path / "run.jsonl")
    away = np.abs(run.measured - raised(info)) / (info.upper - info.lower)
    assert np.nanmin(away.max(axis=1)) < 0.1, "it went where the policy is"
    sent = ~np.isnan(run.sent).any(axis=1)
    speed = np.abs(np.diff(run.sent[sent], axis=0)) / np.diff(run.times[sent])[:, None]
    assert speed.max() <= VELOCITY * 1.001

"""`vla run` on an arm that is no SO101: other joints, other units, a network instead of a serial port."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from arm_bench import sway_server

from vla.contract import JOINT_POSITION, Interface, PolicyContract, Vector
from vla.errors import UserError
from vla.robot_drivers import SupervisorConfig
from vla.robot_drivers.adapters.trossen import LIMITS
from vla.robot_drivers.recorder import read_record
from vla.runtime.robot.run import RunConfig, run_robot

CONTROLLER = Path(__file__).parents[1] / "robot_drivers" / "trossen_controller.py"
ADDRESS = f"127.78.{os.getpid() // 250 % 250}.{os.getpid() % 250 + 1}"  # the ports are the real controller's
POSE = (0.3, 0.5, 0.4, -0.2, 0.1, 0.2, 0.02)
UNITS = ("rad",) * 6 + ("m",)


def contract(units=UNITS) -> PolicyContract:
    """A policy without eyes that stays within 0.01 rad or m of `POSE`."""
    names = tuple(LIMITS)
    around = {"min": [it - 0.01 for it in POSE], "max": [it + 0.01 for it in POSE]}
    around |= {"mean": list(POSE), "std": [0.01] * 7}
    interface = Interface(
        cameras=(),
        state=Vector("observation.state", names, units),
        action=Vector("action", names, units),
        action_space=JOINT_POSITION,
        control_rate=10.0,
    )
    normalization = {"observation.state": "MEAN_STD", "action": "MIN_MAX"}
    statistics = {"observation.state": around, "action": around}
    return PolicyContract(
        interface, chunk_size=16, n_action_steps=8, normalization=normalization, statistics=statistics
    )


@pytest.mark.parametrize("units", [UNITS, ()], ids=["named units", "si"])
def test_a_policy_drives_an_arm_of_another_make_and_leaves_it_at_rest(tmp_path, capsys, units):
    record = tmp_path / "record"
    pipe = subprocess.PIPE
    controller = subprocess.Popen(
        [sys.executable, "-P", str(CONTROLLER), ADDRESS], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    try:
        assert controller.stdout.readline(), controller.stderr.read()
        with sway_server(contract(units), amplitude=0.005) as server:
            run_robot(
                RunConfig(
                    task="sway",
                    robot="trossen",
                    address=ADDRESS,
                    server=server,
                    seconds=4.0,
                    soft_start=0.5,
                    joint_units="contract" if units else "si",
                    record=record,
                    supervisor=SupervisorConfig(
                        rest_speed=1.0, sample_patience=1.0, lost_after=2.0, stale_hold=1.0
                    ),
                )
            )
        controller.stdin.write(json.dumps({"look": True}) + "\n")
        controller.stdin.flush()
        seen = json.loads(controller.stdout.readline())
    finally:
        controller.kill()
        controller.communicate()
    assert "The 4 s of this run are over. The arm is at rest and released." in capsys.readouterr().err
    assert not any(seen["energised"]) and np.abs(seen["positions"]).max() < 0.1
    measured = read_record(record / "arm.jsonl").measured
    assert np.nanmin(np.abs(measured - np.array(POSE)).max(axis=1)) < 0.03, "it went where the policy is"


def test_an_address_is_needed():
    with (
        sway_server(contract()) as server,
        pytest.raises(UserError, match="--address"),
    ):
        run_robot(RunConfig(task="sway", robot="trossen", server=server))

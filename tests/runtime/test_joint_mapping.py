"""Units and joint order by hand, and LeRobot's own normalisation as the reference."""

import math
from dataclasses import replace

import numpy as np
import pytest
from arm_bench import arm_contract

from vla.contract import ContractError, Vector
from vla.robot_drivers import DriverInfo, Joint
from vla.robot_drivers.so101.calibration import JOINTS, JointCalibration
from vla.robot_drivers.so101.driver import So101Driver, so101_info
from vla.runtime.robot.joint_mapping import JointMapping
from vla.runtime.robot.soft_start import SLOWEST, SoftStart

CALIBRATION = {
    name: JointCalibration(id, 0, 0, 700 + 40 * id, 3100 - 70 * id) for id, name in enumerate(JOINTS, 1)
}
INFO = so101_info(CALIBRATION)


def test_units_and_order_by_hand():
    info = DriverInfo(
        "two",
        (
            Joint("lift", -1.0, 3.0, 1, 1),
            Joint("gripper", 0.0, 1.0, 1, 1, unit="fraction", kind="gripper"),
            Joint("rail", 0.0, 0.5, 1, 1, unit="m", kind="prismatic"),
        ),
        100.0,
        "falls",
    )
    vector = Vector("action", ("gripper.pos", "rail", "lift.pos"), ("percent", "m", "deg"))
    mapping = JointMapping.make(vector, info)
    assert mapping.to_setpoint(np.array([25.0, 0.2, 90.0])) == pytest.approx(
        {"gripper": 0.25, "rail": 0.2, "lift": math.pi / 2}
    )
    assert mapping.from_joints(np.array([math.pi / 2, 0.25, 0.2])).tolist() == pytest.approx([25, 0.2, 90])
    normalized = JointMapping.make(vector, info, "lerobot-normalized")
    # -100 to 100 spans -1 to 3 rad: 50 is 2 rad.
    assert normalized.to_setpoint(np.array([25.0, 0.2, 50.0]))["lift"] == pytest.approx(2.0)
    with pytest.raises(ContractError, match="'lift' moves in rad, which 'm' cannot be turned into"):
        JointMapping.make(replace(vector, units=("percent", "m", "m")), info)
    with pytest.raises(ContractError, match="each joint is needed once"):
        JointMapping.make(replace(vector, names=("lift", "rail", "lift.pos")), info)
    with pytest.raises(ContractError, match=r"does not say in which units 'action' is.*--joint-units"):
        JointMapping.make(replace(vector, units=()), info)


@pytest.mark.parametrize(
    ("convention", "degrees"), [("lerobot-degrees", True), ("lerobot-normalized", False)]
)
def test_lerobots_follower_means_the_same_positions(convention, degrees):
    from lerobot.motors import Motor, MotorCalibration, MotorNormMode
    from lerobot.motors.feetech import FeetechMotorsBus

    body = MotorNormMode.DEGREES if degrees else MotorNormMode.RANGE_M100_100
    motors = {
        name: Motor(it.id, "sts3215", MotorNormMode.RANGE_0_100 if name == "gripper" else body)
        for name, it in CALIBRATION.items()
    }
    bus = FeetechMotorsBus(
        "none", motors, {name: MotorCalibration(**vars(it)) for name, it in CALIBRATION.items()}
    )
    driver = So101Driver("none", CALIBRATION)
    mapping = JointMapping.make(arm_contract(CALIBRATION).interface.action, INFO, convention)
    for share in (0.1, 0.5, 0.83):
        steps = {
            it.id: round(it.range_min + share * (it.range_max - it.range_min)) for it in CALIBRATION.values()
        }
        theirs = bus._normalize(steps)
        ours = np.array([driver._position(name, steps[it.id]) for name, it in CALIBRATION.items()])
        setpoint = mapping.to_setpoint(np.array([theirs[it.id] for it in CALIBRATION.values()]))
        assert [setpoint[name] for name in JOINTS] == pytest.approx(ours, abs=1e-3)
        assert mapping.from_joints(ours) == pytest.approx([theirs[i] for i in range(1, 7)], abs=0.05)


def test_a_soft_start_begins_where_the_arm_is_and_comes_up_to_speed():
    soft = SoftStart(INFO, seconds=2.0)
    goal = dict.fromkeys(JOINTS, 1.0)
    begin = np.zeros(6)
    assert soft.limit(goal, begin, 10.0) == pytest.approx(dict.fromkeys(JOINTS, 0.0))
    path, times = [begin], np.arange(1, 41) * 0.05
    for now in 10.0 + times:
        asked = soft.limit(goal, begin, now)
        path.append(np.array([asked[name] for name in JOINTS]))
    speeds = np.diff(path, axis=0) / 0.05
    bound = (SLOWEST + (1 - SLOWEST) * times / 2.0)[:, None] * INFO.velocity
    assert (speeds <= bound + 1e-6).all()
    assert speeds[0, 0] == pytest.approx(bound[0, 0]), "as fast as it may"
    assert (path[-1] == 1.0).all(), "it arrives, and does not overshoot"
    away = dict.fromkeys(JOINTS, -1.0)
    assert soft.limit(away, begin, 12.01) == away, "after its time setpoints pass as they are"

"""The emulated SO101 as a mechanism: what its motors can do, what its servos sense, and when it falls."""

import math
from itertools import pairwise

import mujoco
import numpy as np
import pytest

from vla.robot_drivers.emulation.plant import (
    MODEL,
    STEPS_PER_RADIAN,
    Plant,
    emulated_calibration,
    motor_servos,
    to_angle,
    to_steps,
)
from vla.robot_drivers.so101 import registers as r
from vla.robot_drivers.so101.calibration import JOINTS, check_calibration

DT = 0.004
LIFT, ELBOW, GRIPPER = 1, 2, 5


@pytest.fixture(scope="module")
def model() -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_path(str(MODEL))


@pytest.fixture
def plant(model) -> Plant:
    model = mujoco.MjModel.from_xml_path(str(MODEL))  # a plant changes the gains of its model
    return Plant(model, mujoco.MjData(model), motor_servos(emulated_calibration(model)))


def energise(plant: Plant) -> None:
    for servo in plant.servos:
        servo.write(r.TORQUE_ENABLE.address, b"\x01")


def run(plant: Plant, seconds: float) -> np.ndarray:
    """Encoders (n, 6) after every tick."""
    path = []
    for _ in range(round(seconds / DT)):
        plant.tick(DT)
        path.append([servo.encoder for servo in plant.servos])
    return np.array(path)


def test_the_model_has_the_published_masses_and_kinematics(model):
    """632 g in all; at zero the upper arm stands up and the forearm points forward, link by link."""
    assert model.nq == model.nu == 6 and model.nmesh == 0
    assert model.body_mass.sum() == pytest.approx(0.632, abs=1e-3)
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    hand = data.body("gripper")
    assert hand.xpos == pytest.approx(
        [0.0388 + 0.0304 + 0.028 + 0.1349 + 0.0611, 0, 0.0624 + 0.0542 + 0.1126 + 0.0052], abs=1e-3
    )
    assert data.site("grasp").xpos[0] == pytest.approx(hand.xpos[0] + 0.093, abs=2e-3)
    assert np.degrees(model.jnt_range[0]) == pytest.approx([-110, 110], abs=0.1)


def test_the_calibration_is_the_models_joint_limits(model):
    calibration = emulated_calibration(model)
    check_calibration(calibration, "it")
    for name, it in calibration.items():
        low, high = model.joint(name).range
        assert 0 <= to_angle(it.range_min) - low < 1 / STEPS_PER_RADIAN
        assert 0 <= high - to_angle(it.range_max) < 1 / STEPS_PER_RADIAN
    assert to_steps(math.pi / 2) == 2048 + 1024


def test_an_energised_arm_holds_against_gravity_and_says_so(plant):
    energise(plant)
    path = run(plant, 1.0)
    assert np.abs(path - 2048).max() < 1.0  # a step is 0.09 degrees
    load = plant.servos[LIFT].get(r.PRESENT_LOAD)
    gravity = plant.data.qfrc_bias[LIFT]
    assert load / 1000 * 2.94 == pytest.approx(gravity, abs=0.06)  # dry friction carries some
    assert abs(gravity) > 0.4
    assert plant.servos[LIFT].get(r.PRESENT_CURRENT) * 0.0065 == pytest.approx(
        2.7 * abs(load) / 1000, abs=0.01
    )


def test_an_arm_without_torque_falls_and_takes_hold_where_it_is(plant):
    energise(plant)
    run(plant, 0.2)
    for servo in plant.servos:
        servo.write(r.TORQUE_ENABLE.address, b"\x00")
    fallen = run(plant, 1.2)[-1]
    assert abs(fallen[LIFT] - 2048) > 300 and abs(fallen[ELBOW] - 2048) > 100
    energise(plant)
    held = run(plant, 0.5)[-1]
    assert np.abs(held - fallen).max() < 12


def test_motion_keeps_the_servos_own_limits(plant):
    """1000 steps/s and 2000 steps/s², with the masses of the whole arm on the joint."""
    energise(plant)
    servo = plant.servos[0]
    servo.put(r.ACCELERATION, 20)
    servo.put(r.GOAL_VELOCITY, 1000)
    servo.put(r.GOAL_POSITION, 2048 + 1000)
    path = run(plant, 2.0)[:, 0]
    speeds = [(b - a) / DT for a, b in pairwise(path)]
    assert max(speeds) == pytest.approx(1000, rel=0.08)
    assert path[124] - 2048 == pytest.approx(250, abs=15) and path[-1] == pytest.approx(3048, abs=1.0)
    assert servo.get(r.PRESENT_VELOCITY) == pytest.approx(0, abs=5)


def test_torque_limit_bounds_the_force(plant):
    """10 % of 2.94 N·m cannot hold the stretched arm."""
    energise(plant)
    plant.servos[LIFT].put(r.TORQUE_LIMIT, 100)
    path = run(plant, 1.0)[:, LIFT]
    assert abs(path[-1] - 2048) > 100
    assert abs(plant.servos[LIFT].get(r.PRESENT_LOAD)) <= 100


def test_a_jammed_joint_overloads_and_keeps_its_protective_torque(plant):
    energise(plant)
    plant.servos[0].jammed = True
    plant.servos[0].put(r.PROTECTION_TIME, 50)
    plant.servos[0].put(r.GOAL_POSITION, 2600)
    assert abs(run(plant, 0.4)[-1, 0] - 2048) < 5
    assert plant.servos[0].get(r.PRESENT_LOAD) == 1000 and plant.servos[0].status() == 0
    run(plant, 0.2)
    assert plant.servos[0].status() == r.Condition.OVERLOAD
    assert plant.servos[0].get(r.PRESENT_LOAD) == 200
    plant.servos[0].jammed = False
    plant.servos[0].write(r.TORQUE_ENABLE.address, b"\x01")
    assert run(plant, 0.8)[-1, 0] == pytest.approx(2600, abs=2)


def test_windings_warm_up_with_the_square_of_the_load_and_heat_cuts_the_torque(plant):
    servo = plant.servos[GRIPPER]
    for load in (0.5, 1.0):
        servo.temperature = 30
        for _ in range(1000):
            servo.feel(2048, 0.0, load, 0.1)
        expected = 30 + 60 * load**2 * (1 - math.exp(-100 / 300))
        assert servo.temperature == pytest.approx(expected, abs=1)
    energise(plant)
    servo.temperature = 80
    run(plant, 0.02)
    assert servo.get(r.TORQUE_ENABLE) == 0 and plant.servos[0].get(r.TORQUE_ENABLE) == 1


def test_it_takes_six_servos(plant):
    with pytest.raises(ValueError, match="6 servos"):
        Plant(plant.model, plant.data, plant.servos[:5])
    assert [servo.id for servo in plant.servos] == list(range(1, len(JOINTS) + 1))

"""The driver interface: descriptions that cannot be wrong, and no dependence on torch or the model."""

import math
import subprocess
import sys

import pytest

from vla.errors import UserError
from vla.robot_drivers import BusTimeout, DriverFault, DriverInfo, Joint, ServoFault


def joint(**changes) -> Joint:
    return Joint(**{"name": "elbow", "lower": -1, "upper": 1, "velocity": 2, "acceleration": 9} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"lower": 1.0},
        {"upper": math.nan},
        {"lower": -math.inf},
        {"velocity": 0.0},
        {"acceleration": -1.0},
        {"velocity": math.inf},
    ],
)
def test_limits_that_bound_nothing_are_refused(changes):
    with pytest.raises(UserError, match="Joint 'elbow'"):
        joint(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"joints": ()}, "need names"),
        ({"joints": (joint(), joint())}, "need names"),
        ({"control_rate": 0}, "control rate 0 Hz"),
        ({"control_rate": math.nan}, "control rate nan Hz"),
        ({"modes": frozenset({"ee_pose"})}, "joint positions"),
    ],
)
def test_impossible_arms_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        DriverInfo(
            **{"name": "arm", "joints": (joint(),), "control_rate": 50, "power_off": "falls"} | changes
        )


def test_joint_vectors_follow_the_order_of_the_joints():
    info = DriverInfo("arm", (joint(name="b"), joint(name="a", lower=-2, velocity=3)), 50, "falls")
    assert info.joint_names == ("b", "a")
    assert info.lower.tolist() == [-1, -2] and info.upper.tolist() == [1, 1]
    assert info.velocity.tolist() == [2, 3] and info.acceleration.tolist() == [9, 9]


def test_faults_are_sentences_and_say_which_joint():
    fault = ServoFault("elbow", ["overload", "overheating"], "Let it cool down.")
    assert isinstance(fault, DriverFault) and isinstance(fault, UserError)
    assert str(fault) == "Joint 'elbow' reports overload and overheating. Let it cool down."
    assert BusTimeout(["a", "b"], "silent").joints == ("a", "b")


def test_the_room_imports_without_torch_lerobot_and_the_model():
    script = (
        "import sys, vla.robot_drivers;"
        "assert not {'torch', 'lerobot', 'transformers', 'vla.policy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", script], check=True, timeout=120)

"""The contract: what it reads from datasets, which mismatches it names, which files it refuses."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.contract import (
    JOINT_POSITION,
    OSC_POSE_DELTA,
    Camera,
    ContractError,
    Interface,
    PolicyContract,
    Vector,
)

INTERFACE = Interface(
    cameras=(Camera("observation.images.image", 256, 256), Camera("observation.images.image2", 256, 256)),
    state=Vector("observation.state", ("x", "y"), ("m", "m")),
    action=Vector("action", ("dx", "dy", "gripper")),
    action_space=OSC_POSE_DELTA,
    control_rate=20.0,
)
CONTRACT = PolicyContract(
    interface=INTERFACE,
    chunk_size=8,
    n_action_steps=8,
    normalization={"observation.state": "MEAN_STD", "action": "MIN_MAX"},
    statistics={"observation.state": {"mean": [0.1, 0.2]}, "action": {"min": [-1.0, -1.0, -1.0]}},
)


def test_saved_contract_reads_back_equal(tmp_path):
    path = CONTRACT.save(tmp_path)
    assert path.name == "contract.json" and [entry.name for entry in tmp_path.iterdir()] == ["contract.json"]
    assert PolicyContract.load(tmp_path) == CONTRACT


numbers = st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=8)


@given(st.dictionaries(st.sampled_from(["min", "max", "mean"]), numbers, min_size=1))
def test_statistics_survive_the_file_bit_for_bit(tmp_path_factory, statistics):
    folder = tmp_path_factory.mktemp("contract")
    contract = replace(CONTRACT, statistics={"action": statistics})
    contract.save(folder)
    assert PolicyContract.load(folder).statistics == contract.statistics


def test_the_same_interface_fits():
    CONTRACT.require(INTERFACE, source="itself")


def test_more_cameras_than_needed_fit():
    CONTRACT.require(
        replace(INTERFACE, cameras=(*INTERFACE.cameras, Camera("observation.images.top", 8, 8))), source="x"
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"cameras": (Camera("observation.images.front", 256, 256), INTERFACE.cameras[1])},
            "camera 'observation.images.image' is missing .offered: observation.images.front",
        ),
        ({"cameras": (Camera("observation.images.image", 128, 96), INTERFACE.cameras[1])}, "is 128x96"),
        ({"state": Vector("observation.state", ("x", "y", "z"))}, "the state has 3 entries, expected 2"),
        ({"state": None}, "no state is offered, expected 2 entries"),
        ({"state": Vector("observation.state", ("x", "y"), ("mm", "mm"))}, "the state is in units"),
        ({"action": Vector("action", ("a",))}, "the action has 1 entries, expected 3"),
        ({"action_space": JOINT_POSITION}, "it commands 'osc_pose_delta' but 'joint_position'"),
        ({"action_space": None}, "the other side does not say what its actions mean"),
        ({"control_rate": 30.0}, "trained at 20 Hz but 30 Hz"),
    ],
)
def test_each_mismatch_is_named(change, sentence):
    with pytest.raises(ContractError, match=sentence):
        CONTRACT.require(replace(INTERFACE, **change), source="the dataset at data/demo")


def test_all_mismatches_are_named_at_once():
    offer = replace(INTERFACE, control_rate=5.0, state=None, action_space=JOINT_POSITION)
    assert len(CONTRACT.mismatches(offer)) == 3


def test_a_policy_without_state_accepts_any_state():
    stateless = replace(CONTRACT, interface=replace(INTERFACE, state=None))
    assert stateless.mismatches(INTERFACE) == []


def damaged(tmp_path, change) -> None:
    path = CONTRACT.save(tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["statistics"]["action"]["min"].__setitem__(0, 0.0), "do not match their recorded hash"),
        (lambda c: c.update(statistics_hash="0"), "do not match their recorded hash"),
        (lambda c: c.update(version=2), "contract version 2, this release reads 1"),
        (lambda c: c.update(colour="red"), r"unknown keys \['colour'\]"),
        (lambda c: c.pop("chunk_size"), r"lacks \['chunk_size'\]"),
        (lambda c: c["interface"].pop("cameras"), "malformed"),
        (lambda c: c["interface"]["cameras"][0].update(depth=1), "malformed"),
        (lambda c: c["interface"]["action"].update(names=None), "malformed"),
        (lambda c: c.update(interface=None), "malformed"),
        (lambda c: c["interface"].update(control_rate="fast"), "malformed"),
    ],
)
def test_damaged_file_is_refused(tmp_path, change, sentence):
    damaged(tmp_path, change)
    with pytest.raises(ContractError, match=sentence):
        PolicyContract.load(tmp_path)


def test_missing_truncated_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(ContractError, match="does not exist"):
        PolicyContract.load(tmp_path)
    (tmp_path / "contract.json").write_text('{"version": 1, "inter')
    with pytest.raises(ContractError, match="not valid JSON"):
        PolicyContract.load(tmp_path)
    (tmp_path / "contract.json").write_text("[1, 2]")
    with pytest.raises(ContractError, match="not hold a JSON object"):
        PolicyContract.load(tmp_path)


def lerobot_info(**features):
    image = {"dtype": "video", "shape": [480, 640, 3], "names": ["height", "width", "channels"]}
    action = {"dtype": "float32", "shape": [2], "names": {"motors": ["pan", "lift"]}}
    return {"fps": 30, "features": {"observation.images.front": image, "action": action} | features}


def test_interface_is_read_from_lerobot_metadata():
    interface = Interface.from_dataset(lerobot_info(), action_space=JOINT_POSITION)
    assert interface.cameras == (Camera("observation.images.front", 480, 640),)
    assert interface.action.names == ("pan", "lift") and interface.state is None
    assert interface.action_space == JOINT_POSITION and interface.control_rate == 30.0


def test_channel_first_images_and_nameless_vectors():
    interface = Interface.from_dataset(
        lerobot_info(
            **{
                "observation.images.front": {"dtype": "image", "shape": [3, 120, 160]},
                "observation.state": {"dtype": "float32", "shape": [3], "names": None},
            }
        )
    )
    assert interface.cameras == (Camera("observation.images.front", 120, 160),)
    assert interface.state.names == ("state_0", "state_1", "state_2")


def test_action_space_of_our_own_datasets():
    action = {"dtype": "float32", "shape": [1], "names": ["a"], "action_space": OSC_POSE_DELTA}
    assert Interface.from_dataset(lerobot_info(action=action)).action_space == OSC_POSE_DELTA


def test_dataset_without_action_or_camera_is_refused():
    with pytest.raises(ContractError, match="no 'action' feature"):
        Interface.from_dataset({"fps": 10, "features": {}})
    with pytest.raises(ContractError, match="no camera"):
        Interface.from_dataset({"fps": 10, "features": {"action": lerobot_info()["features"]["action"]}})


def test_contract_imports_neither_torch_nor_a_simulator():
    code = "import sys, vla.contract; assert not {'torch', 'mujoco', 'lerobot'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)

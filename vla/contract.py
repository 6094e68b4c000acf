"""The contract that travels with every checkpoint.

An `Interface` is what one side of the loop speaks: cameras, state, action space, units and rate.
Datasets, simulators and robots each *offer* an `Interface`; a checkpoint *requires* one. A
`PolicyContract` is that requirement together with what the policy promises (chunk length) and the
normalisation statistics it was trained with. Train, eval, serve and the arm call
`PolicyContract.require` before the first step, so that a mismatch is a sentence and not a silent 0 %.

This module imports neither torch nor a simulator: both sides read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vla.atomic import write_text
from vla.errors import UserError
from vla.json_file import load_json

CONTRACT_FILE = "contract.json"
CONTRACT_VERSION = 1
IMAGE_PREFIX = "observation.images."
STATE_KEY = "observation.state"
ACTION_KEY = "action"

#: 7-D delta of robosuite's OSC_POSE controller, each entry in [-1, 1]: +-1 is a goal offset of 5 cm
#: or 0.5 rad; the last entry is the gripper, -1 open and +1 close.
OSC_POSE_DELTA = "osc_pose_delta"
#: Joint targets in the units of the joints (`Vector.units`).
JOINT_POSITION = "joint_position"


class ContractError(UserError):
    """Two sides of the loop do not speak the same interface."""


@dataclass(frozen=True)
class Camera:
    """One camera stream. `key` is the LeRobot feature (``observation.images.<name>``); sizes in pixels."""

    key: str
    height: int
    width: int


@dataclass(frozen=True)
class Vector:
    """A named float vector. `units` holds one unit per entry, or is empty when the source does not say."""

    key: str
    names: tuple[str, ...]
    units: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        """Number of entries."""
        return len(self.names)


@dataclass(frozen=True)
class Interface:
    """What one side of the loop speaks.

    `action_space` is one of the names in this module or None when the source does not say;
    `control_rate` is in Hz. Images are RGB, uint8 at the source, upright as the policy sees them.
    """

    cameras: tuple[Camera, ...]
    state: Vector | None
    action: Vector
    action_space: str | None
    control_rate: float

    @classmethod
    def from_dataset(cls, info: Mapping[str, Any], *, action_space: str | None = None) -> Interface:
        """Read the interface from a LeRobotDataset's ``meta/info.json``.

        `action_space` overrides what the metadata says, in the action feature (where LeRobot's tools keep
        it) or at top level; datasets made elsewhere say nothing.
        Raises `ContractError` when the dataset has no action or no camera.
        """
        features = info["features"]
        if ACTION_KEY not in features:
            raise ContractError("The dataset has no 'action' feature; a policy cannot learn from it.")
        cameras = tuple(
            _camera(key, feature)
            for key, feature in features.items()
            if feature["dtype"] in ("video", "image") and key.startswith(IMAGE_PREFIX)
        )
        if not cameras:
            raise ContractError(
                f"The dataset has no camera: no image or video feature is named '{IMAGE_PREFIX}*'."
            )
        return cls(
            cameras=cameras,
            state=_vector(STATE_KEY, features[STATE_KEY]) if STATE_KEY in features else None,
            action=_vector(ACTION_KEY, features[ACTION_KEY]),
            action_space=action_space or features[ACTION_KEY].get("action_space") or info.get("action_space"),
            control_rate=float(info["fps"]),
        )


@dataclass(frozen=True)
class PolicyContract:
    """What a checkpoint expects of its inputs and promises of its outputs.

    `chunk_size` actions are predicted per query and the first `n_action_steps` of them executed.
    `normalization` maps a feature key to its mode; `statistics` maps a feature key to its numbers
    (``min, max, mean, std, q01, q99``, each one value per entry).
    """

    interface: Interface
    chunk_size: int
    n_action_steps: int
    normalization: dict[str, str]
    statistics: dict[str, dict[str, list[float]]]
    version: int = CONTRACT_VERSION

    @property
    def statistics_hash(self) -> str:
        """SHA-256 over the canonical JSON of the statistics."""
        text = json.dumps(self.statistics, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def max_frame_age(self) -> float:
        """Seconds after which a camera's frame is too old to act on: five control periods, at least 0.2 s."""
        return max(5 / self.interface.control_rate, 0.2)

    def save(self, folder: Path) -> Path:
        """Write ``contract.json`` into `folder` atomically and return its path."""
        return write_text(Path(folder) / CONTRACT_FILE, json.dumps(self.as_dict(), indent=2) + "\n")

    def as_dict(self) -> dict[str, Any]:
        """Return what ``contract.json`` holds and a policy server sends."""
        return asdict(self) | {"statistics_hash": self.statistics_hash}

    @classmethod
    def from_dict(cls, content: Any, source: str) -> PolicyContract:
        """Read what `as_dict` gave; raise `ContractError` (naming `source`) if it is foreign or altered."""
        return _parse_contract(content, source)

    @classmethod
    def load(cls, folder: Path) -> PolicyContract:
        """Read and verify ``contract.json``; raise `ContractError` if it is absent, foreign or altered."""
        path = Path(folder) / CONTRACT_FILE
        absent = f"{path} does not exist: not a CogMerge checkpoint, or one copied without its contract."
        content = load_json(path, absent=absent, remedy="copy the checkpoint again", error=ContractError)
        return cls.from_dict(content, str(path))

    def require(self, offer: Interface, *, source: str) -> None:
        """Raise `ContractError` naming every way in which `offer` differs from this contract.

        `source` says in words who offers, for example ``"the dataset at data/demo"``.
        """
        problems = self.mismatches(offer)
        if problems:
            raise ContractError(f"The checkpoint does not fit {source}: " + "; ".join(problems) + ".")

    def mismatches(self, offer: Interface) -> list[str]:
        """Return one phrase per difference between the required and the offered interface."""
        need = self.interface
        problems = _camera_mismatches(need.cameras, offer.cameras)
        problems += _vector_mismatches("state", need.state, offer.state)
        problems += _vector_mismatches("action", need.action, offer.action)
        if need.action_space is None or offer.action_space is None:
            silent = "checkpoint" if need.action_space is None else "other side"
            problems.append(
                f"the {silent} does not say what its actions mean (train with --action-space, for example"
                f" {OSC_POSE_DELTA})"
            )
        elif need.action_space != offer.action_space:
            problems.append(f"it commands '{need.action_space}' but '{offer.action_space}' is expected")
        if abs(need.control_rate - offer.control_rate) > 1e-6 * need.control_rate:
            problems.append(
                f"it was trained at {need.control_rate:g} Hz but {offer.control_rate:g} Hz is offered"
            )
        return problems


def _camera(key: str, feature: Mapping[str, Any]) -> Camera:
    shape = tuple(feature["shape"])
    height, width = shape[1:] if shape[0] in (1, 3) and shape[-1] not in (1, 3) else shape[:2]
    return Camera(key, int(height), int(width))


def _vector(key: str, feature: Mapping[str, Any]) -> Vector:
    (dim,) = feature["shape"]
    names = feature.get("names")
    if isinstance(names, Mapping):  # LeRobot also writes {"axes": [...]} and {"motors": [...]}
        names = next(iter(names.values()))
    if not names or len(names) != dim:
        names = [f"{key.rsplit('.', 1)[-1]}_{i}" for i in range(dim)]
    return Vector(key, tuple(map(str, names)), tuple(feature.get("units") or ()))


def _camera_mismatches(need: tuple[Camera, ...], offer: tuple[Camera, ...]) -> list[str]:
    offered = {camera.key: camera for camera in offer}
    problems = []
    for camera in need:
        other = offered.get(camera.key)
        if other is None:
            problems.append(
                f"camera '{camera.key}' is missing (offered: {', '.join(sorted(offered)) or 'none'})"
            )
        elif (other.height, other.width) != (camera.height, camera.width):
            problems.append(
                f"camera '{camera.key}' is {other.height}x{other.width},"
                f" expected {camera.height}x{camera.width}"
            )
    return problems


def _vector_mismatches(what: str, need: Vector | None, offer: Vector | None) -> list[str]:
    if need is None:
        return []
    if offer is None:
        return [f"no {what} is offered, expected {need.dim} entries"]
    if need.dim != offer.dim:
        return [f"the {what} has {offer.dim} entries, expected {need.dim} ({', '.join(need.names)})"]
    if need.units and offer.units and need.units != offer.units:
        return [f"the {what} is in units {offer.units}, expected {need.units}"]
    return []


def _parse_contract(content: Any, source: str) -> PolicyContract:
    if not isinstance(content, Mapping):
        raise ContractError(f"{source} does not hold a JSON object; copy the checkpoint again.")
    if content.get("version") != CONTRACT_VERSION:
        raise ContractError(
            f"{source} has contract version {content.get('version')!r},"
            f" this release reads {CONTRACT_VERSION}."
        )
    recorded = content.get("statistics_hash")
    known = {field.name for field in fields(PolicyContract)} | {"statistics_hash"}
    unknown, absent = sorted(content.keys() - known), sorted(known - content.keys())
    if unknown or absent:
        raise ContractError(
            f"{source} has unknown keys {unknown} and lacks {absent}; it was not written by this release."
        )
    try:
        contract = PolicyContract(
            interface=_parse_interface(content["interface"]),
            **{key: content[key] for key in known - {"interface", "statistics_hash"}},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ContractError(f"{source} is malformed ({error!r}); copy the checkpoint again.") from None
    if contract.statistics_hash != recorded:
        raise ContractError(
            f"The normalisation statistics in {source} do not match their recorded hash: the file was edited"
            " or mixed up."
        )
    return contract


def _parse_interface(content: Mapping[str, Any]) -> Interface:
    def vector(entry: Mapping[str, Any] | None) -> Vector | None:
        return entry and Vector(entry["key"], tuple(entry["names"]), tuple(entry["units"]))

    return Interface(
        cameras=tuple(Camera(**camera) for camera in content["cameras"]),
        state=vector(content["state"]),
        action=vector(content["action"]),
        action_space=content["action_space"],
        control_rate=float(content["control_rate"]),
    )

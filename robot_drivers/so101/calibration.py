"""LeRobot's calibration files, and what they make of a servo's steps.

A file maps joint names to ``id, drive_mode, homing_offset, range_min, range_max``. Body joints are angles
about the middle of their range, as LeRobot's degrees are; the gripper is the fraction of its range, 0 closed
and 1 open, as LeRobot's 0 to 100 is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from vla.atomic import write_text

from ..faults import NotCalibrated
from . import registers as r

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
GRIPPER = "gripper"
RADIANS_PER_STEP = 2 * math.pi / (r.STEPS_PER_TURN - 1)  # LeRobot divides the turn by 4095


@dataclass(frozen=True)
class JointCalibration:
    """Where one joint's servo has its zero (`homing_offset`, steps) and its limits (steps)."""

    id: int
    drive_mode: int
    homing_offset: int
    range_min: int
    range_max: int

    @property
    def eeprom(self) -> dict[r.Register, int]:
        """What the servo must carry for the file to be about it."""
        return {
            r.HOMING_OFFSET: self.homing_offset,
            r.MIN_POSITION_LIMIT: self.range_min,
            r.MAX_POSITION_LIMIT: self.range_max,
        }

    def to_angle(self, steps: float) -> float:
        """Return radians from the middle of the range."""
        return (steps - (self.range_min + self.range_max) / 2) * RADIANS_PER_STEP

    def from_angle(self, angle: float) -> int:
        """Return the nearest step to `angle` (rad)."""
        return round(angle / RADIANS_PER_STEP + (self.range_min + self.range_max) / 2)

    def to_fraction(self, steps: float) -> float:
        """Return the fraction of the range; `drive_mode` 1 counts from its other end."""
        fraction = (steps - self.range_min) / (self.range_max - self.range_min)
        return 1 - fraction if self.drive_mode else fraction

    def from_fraction(self, fraction: float) -> int:
        """Return the nearest step to `fraction` of the range."""
        fraction = 1 - fraction if self.drive_mode else fraction
        return round(self.range_min + fraction * (self.range_max - self.range_min))


Calibration = dict[str, JointCalibration]


def calibration_path(id: str, folder: Path | None = None) -> Path:
    """Return where the calibration of the arm `id` is: in `folder`, or where LeRobot keeps it."""
    if folder is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
        home = Path(os.environ.get("HF_LEROBOT_HOME", Path(os.environ.get("HF_HOME", cache)) / "lerobot"))
        folder = Path(os.environ.get("HF_LEROBOT_CALIBRATION", home / "calibration"))
        folder = folder / "robots" / "so_follower"
    return folder.expanduser() / f"{id}.json"


def load_calibration(path: Path) -> Calibration:
    """Read a calibration file. Raises `NotCalibrated` if it is absent, malformed, or of another arm."""
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise NotCalibrated(f"There is no calibration at {path}: calibrate the arm first.") from None
    except (OSError, ValueError) as error:
        raise NotCalibrated(
            f"{path} is not a calibration file ({error!r}): calibrate the arm again."
        ) from None
    return parse_calibration(content, str(path))


def parse_calibration(content: Mapping[str, Mapping[str, int]], source: str) -> Calibration:
    """Return the calibration that a file's content describes. Raises `NotCalibrated`, naming `source`."""
    known = [field.name for field in fields(JointCalibration)]
    try:
        calibration = {
            name: JointCalibration(**{key: int(entry[key]) for key in known})
            for name, entry in content.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise NotCalibrated(
            f"{source} is not a calibration file ({error!r}): calibrate the arm again."
        ) from None
    check_calibration(calibration, source)
    return calibration


def check_calibration(calibration: Mapping[str, JointCalibration], source: str) -> None:
    """Raise `NotCalibrated` unless `calibration` describes the six joints with ranges that are ranges."""
    if set(calibration) != set(JOINTS):
        raise NotCalibrated(f"{source} has joints {sorted(calibration)}, an SO101 has {sorted(JOINTS)}.")
    if len({it.id for it in calibration.values()}) != len(JOINTS):
        raise NotCalibrated(f"{source} gives two joints the same servo id.")
    for name, it in calibration.items():
        if not 0 <= it.range_min < it.range_max < r.STEPS_PER_TURN:
            raise NotCalibrated(
                f"{source} lets '{name}' move from step {it.range_min} to {it.range_max}: calibrate again."
            )


def save_calibration(path: Path, calibration: Mapping[str, JointCalibration]) -> Path:
    """Write the file as LeRobot does, whole or not at all."""
    content = {name: asdict(it) for name, it in calibration.items()}
    return write_text(Path(path), json.dumps(content, indent=4))

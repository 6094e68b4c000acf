"""What the verbs of `vla robot` share: which arm is meant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla.errors import UserError

from ..arm import ArmConfig
from ..serial_port import serial_ports
from ..so101.calibration import calibration_path

Bounds = tuple[float, float, float, float, float, float]
"""x0 x1 y0 y1 z0 z1 of a box for the gripper, in metres; see `workspace`."""


@dataclass(frozen=True)
class ArmOptions:
    """Which arm is meant."""

    port: str | None = None
    """Serial port, for example /dev/ttyACM0; may be left out where only one adapter is plugged in."""
    id: str = "so101"
    """Name of the arm: its calibration is ID.json, the file that LeRobot writes for `--robot.id=ID`."""
    calibration_dir: Path | None = None
    """Folder of the calibration; LeRobot's own by default."""
    timeout: float = 0.02
    """Seconds that a servo has for its answer."""

    @property
    def calibration_file(self) -> Path:
        """Where the arm's calibration is."""
        return calibration_path(self.id, self.calibration_dir)

    def find_port(self) -> str:
        """Return the port. Raises `UserError` if none is named and there is not exactly one."""
        if self.port is not None:
            return self.port
        ports = serial_ports()
        if not ports:
            raise UserError("No USB serial adapter is plugged in: connect the arm, or name its --port.")
        if len(ports) > 1:
            raise UserError(f"There are several serial adapters, name one with --port: {', '.join(ports)}.")
        return ports[0]

    def arm_config(self, **changes: Any) -> ArmConfig:
        """Return how this arm is connected by `Arm`."""
        arguments = {
            "port": self.find_port(),
            "calibration": str(self.calibration_file),
            "reply_timeout": self.timeout,
        }
        return ArmConfig("so101", arguments, **changes)

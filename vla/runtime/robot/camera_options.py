"""Cameras on the command line: ``NAME=SOURCE``, where SOURCE says which device it is.

    top=0                              the device with that number
    top=/dev/video2                    the device at that path
    top={"type": "opencv", ...}        any camera that LeRobot knows, in its own configuration
    top=emulated:/tmp/.../cameras      a camera of `vla robot emulate`

The first two take the size that the policy was trained on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from vla.contract import IMAGE_PREFIX, PolicyContract
from vla.errors import UserError
from vla.robot_drivers.cameras import BlockingCamera, open_cameras
from vla.robot_drivers.emulation.cameras import EmulatedCamera

EMULATED = "emulated:"
EMULATED_RATE = 30.0  # Hz; drawing on demand would otherwise take a whole core


class PacedEmulatedCamera:
    """A camera of the emulated table behind the interface of LeRobot's cameras, at `EMULATED_RATE`."""

    def __init__(self, address: str, name: str):
        self._address, self._name = address, name
        self._camera: EmulatedCamera | None = None
        self._due = 0.0

    def connect(self) -> None:
        """Find the camera process. Raises ConnectionError."""
        try:
            self._camera = EmulatedCamera(self._address, self._name)
        except UserError as error:
            raise ConnectionError(str(error)) from None

    def read(self) -> np.ndarray:
        """Wait until the next frame is due and draw it. Raises ConnectionError."""
        time.sleep(max(self._due - time.monotonic(), 0.0))
        self._due = time.monotonic() + 1 / EMULATED_RATE
        try:
            return self._camera.read()
        except UserError as error:
            raise ConnectionError(str(error)) from None

    def disconnect(self) -> None:
        """Let go of it."""
        if self._camera is not None:
            self._camera.close()


def make_cameras(options: Sequence[str], contract: PolicyContract) -> dict[str, BlockingCamera]:
    """Make the cameras that `options` name; none is opened yet. Raises `UserError` for what is none."""
    sizes = {
        camera.key.removeprefix(IMAGE_PREFIX): (camera.width, camera.height)
        for camera in contract.interface.cameras
    }
    cameras: dict[str, BlockingCamera] = {}
    for option in options:
        name, equals, source = option.partition("=")
        if not (name and equals and source):
            raise UserError(f"--cameras {option} is not NAME=SOURCE, for example top=0 or top=/dev/video2.")
        if name in cameras:
            raise UserError(f"--cameras names '{name}' twice.")
        if source.startswith(EMULATED):
            cameras[name] = PacedEmulatedCamera(source.removeprefix(EMULATED), name)
        else:
            cameras |= open_cameras({name: _configuration(name, source, sizes.get(name))})
    return cameras


def _configuration(name: str, source: str, size: tuple[int, int] | None) -> dict[str, Any]:
    """Return LeRobot's configuration of a camera."""
    if source.startswith("{"):
        try:
            return json.loads(source)
        except ValueError as error:
            raise UserError(f"The configuration of camera '{name}' is not JSON ({error}).") from None
    device = int(source) if source.isdecimal() else source
    width, height = size or (None, None)
    return {"type": "opencv", "index_or_path": device, "width": width, "height": height}

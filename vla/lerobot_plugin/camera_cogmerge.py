"""LeRobot's view of the emulated arm's cameras: ``{type: cogmerge_emulated, address: ..., camera: top}``.

`vla robot emulate --so101 --cameras` says the address. A frame is drawn when it is asked for, so LeRobot
never sees an old one; `read` alone waits for the next period of `fps`, as a device would.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from lerobot.cameras import Camera, CameraConfig

from vla.errors import UserError
from vla.robot_drivers.emulation.cameras import EmulatedCamera


@CameraConfig.register_subclass("cogmerge_emulated")
@dataclass(kw_only=True)
class CogMergeEmulatedCameraConfig(CameraConfig):
    """`camera` ("top" or "wrist") at the Unix socket `address`; width and height are the emulator's."""

    address: str
    camera: str
    fps: int | None = 30


class CogMergeEmulatedCamera(Camera):
    """One camera of the emulated table. Raises ConnectionError where the emulator is not there."""

    def __init__(self, config: CogMergeEmulatedCameraConfig):
        super().__init__(config)
        self.config = config
        self._client: EmulatedCamera | None = None
        self._due = 0.0

    @property
    def is_connected(self) -> bool:
        """Whether `connect` has found the emulator."""
        return self._client is not None

    @staticmethod
    def find_cameras() -> list[dict[str, Any]]:
        """Emulated cameras cannot be searched for: the emulator says where they are."""
        return []

    def connect(self, warmup: bool = True) -> None:
        """Find the camera; its size must be the configured one, if there is one."""
        if self._client is not None:
            raise ConnectionError(f"The emulated camera '{self.config.camera}' is connected already.")
        try:
            client = EmulatedCamera(self.config.address, self.config.camera)
        except UserError as error:
            raise ConnectionError(str(error)) from None
        wanted = (self.height or client.height, self.width or client.width)
        if wanted != (client.height, client.width):
            client.close()
            raise ConnectionError(
                f"The emulated camera '{self.config.camera}' is {client.height}x{client.width}, not"
                f" {wanted[0]}x{wanted[1]}; start the emulator with that --image-size."
            )
        self.height, self.width = wanted
        self._client = client

    def read(self) -> np.ndarray:
        """Wait until the next frame is due and return it, (H, W, 3) uint8 RGB."""
        time.sleep(max(self._due - time.monotonic(), 0.0))
        self._due = time.monotonic() + 1 / self.fps
        return self.read_latest()

    def async_read(self, timeout_ms: float = 200) -> np.ndarray:
        """Return a frame of this instant; there is nothing to wait for."""
        return self.read_latest()

    def read_latest(self, max_age_ms: int = 500) -> np.ndarray:
        """Return a frame of this instant, (H, W, 3) uint8 RGB."""
        if self._client is None:
            raise ConnectionError(f"The emulated camera '{self.config.camera}' is not connected.")
        try:
            return self._client.read()
        except UserError as error:
            raise ConnectionError(str(error)) from None

    def disconnect(self) -> None:
        """Let go of the camera."""
        if self._client is None:
            raise ConnectionError(f"The emulated camera '{self.config.camera}' is not connected.")
        self._client.close()
        self._client = None

"""Cameras, each in a thread of its own: who wants a frame gets the newest with its age, and never waits.

    with Cameras(open_cameras({"top": {"type": "opencv", "index_or_path": 0}})) as cameras:
        cameras.wait_for_first(10.0)
        frames = cameras.fresh(max_age=0.25)     # {"top": Frame}; StaleFrame if one is older

A camera is anything with LeRobot's `connect`, `read` and `disconnect`. `read` may block for as long as it
likes: its thread blocks, and the frame that everybody sees grows old. A camera that fails is opened again
until it works. Importing this module imports neither LeRobot nor torch; `open_cameras` imports LeRobot.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vla.errors import UserError

RETRY_PAUSE = 0.5
"""Seconds between attempts at a camera that failed."""

CLOSE_TIMEOUT = 3.0
"""Seconds that a blocked camera is waited for at the end; its thread then ends with the program."""

RATE_WINDOW = 30  # frames

CAMERA_ERRORS = (OSError, RuntimeError, ValueError)
"""What LeRobot's cameras raise: ConnectionError and TimeoutError are OSErrors."""


class CameraFault(UserError):
    """A camera cannot be had, or gives nothing that can be used."""


class StaleFrame(CameraFault):
    """The newest frame is older than allowed. `camera` is its name, `age` in seconds."""

    def __init__(self, camera: str, age: float, message: str):
        super().__init__(message)
        self.camera, self.age = camera, age


class BlockingCamera(Protocol):
    """What is needed of LeRobot's `Camera`."""

    def connect(self) -> None:
        """Open the device."""

    def read(self) -> np.ndarray:
        """Wait for the next frame and return it, (H, W, 3) uint8 RGB."""

    def disconnect(self) -> None:
        """Close the device."""


@dataclass(frozen=True)
class Frame:
    """One image (H, W, 3) uint8 RGB, and when it arrived by the monotonic clock (s). Not to be written to."""

    image: np.ndarray
    time: float
    sequence: int

    def age(self, now: float) -> float:
        """Seconds since it arrived."""
        return now - self.time


class CameraThread:
    """Reads one camera for ever. `trouble` is what went wrong last, None while frames come."""

    def __init__(self, name: str, camera: BlockingCamera):
        self.name = name
        self.trouble: str | None = None
        self._camera = camera
        self._frame: Frame | None = None
        self._times: deque[float] = deque(maxlen=RATE_WINDOW)
        self._arrived = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"camera {name}", daemon=True)
        self._thread.start()

    def latest(self) -> Frame | None:
        """Return the newest frame, None before the first. Never waits."""
        return self._frame

    def wait_for_next(self, sequence: int, timeout: float) -> Frame | None:
        """Return a frame with a number above `sequence`, or None if `timeout` (s) passes without one."""
        with self._arrived:
            self._arrived.wait_for(
                lambda: self._frame is not None and self._frame.sequence > sequence, timeout
            )
            frame = self._frame
        return frame if frame is not None and frame.sequence > sequence else None

    @property
    def rate(self) -> float:
        """Frames per second, over the last `RATE_WINDOW`; 0 before the second."""
        times = list(self._times)
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else 0.0

    def request_stop(self) -> None:
        """Ask the thread to end after the frame that it waits for."""
        self._stop.set()

    def join(self, timeout: float) -> bool:
        """Wait until the thread has ended and the device is closed; return whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def why_silent(self) -> str:
        """Return what is known of a camera that gives no frames."""
        if self.trouble is not None:
            return self.trouble
        return "its thread has ended" if not self._thread.is_alive() else "it is connected but gives nothing"

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._camera.connect()
                self._read_on()
            except CAMERA_ERRORS as error:
                self.trouble = " ".join(str(error).split()) or type(error).__name__
            finally:
                with contextlib.suppress(*CAMERA_ERRORS):  # it may not have been connected
                    self._camera.disconnect()
            self._stop.wait(RETRY_PAUSE)

    def _read_on(self) -> None:
        while not self._stop.is_set():
            image = np.array(self._camera.read())  # its own copy: some cameras fill one buffer for ever
            now = time.monotonic()
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"a frame is {image.dtype} {image.shape}, not uint8 (H, W, 3)")
            with self._arrived:
                sequence = 0 if self._frame is None else self._frame.sequence + 1
                self._frame = Frame(image, now, sequence)
                self._times.append(now)
                self.trouble = None
                self._arrived.notify_all()


class Cameras:
    """Several cameras by name; a context manager that closes them."""

    def __init__(self, cameras: Mapping[str, BlockingCamera]):
        self.threads = {name: CameraThread(name, camera) for name, camera in cameras.items()}

    def latest(self) -> dict[str, Frame | None]:
        """Return every camera's newest frame. Never waits."""
        return {name: thread.latest() for name, thread in self.threads.items()}

    def wait_for_first(self, timeout: float) -> dict[str, Frame]:
        """Return a first frame of every camera; raise `CameraFault` naming all without one in time (s)."""
        until = time.monotonic() + timeout
        frames = {
            name: thread.wait_for_next(-1, max(until - time.monotonic(), 0.0))
            for name, thread in self.threads.items()
        }
        silent = [
            f"'{name}' ({self.threads[name].why_silent()})" for name, it in frames.items() if it is None
        ]
        if silent:
            raise CameraFault(
                f"No picture within {timeout:g} s from camera {', '.join(silent)}: is it plugged in, is that"
                " its number, and does no other program hold it? `lerobot-find-cameras` lists what is there."
            )
        return frames

    def fresh(self, max_age: float, now: float | None = None) -> dict[str, Frame]:
        """Return every camera's newest frame, none older than `max_age` (s). Never waits.

        Raises `StaleFrame` for the oldest that is.
        """
        now = time.monotonic() if now is None else now
        frames, oldest = {}, None
        for name, frame in self.latest().items():
            age = np.inf if frame is None else frame.age(now)
            if not age <= max_age and (oldest is None or age > oldest[1]):
                oldest = (name, age)
            frames[name] = frame
        if oldest is not None:
            name, age = oldest
            since = "has given no picture yet" if age == np.inf else f"has given no picture for {age:.2f} s"
            trouble = self.threads[name].trouble
            raise StaleFrame(
                name,
                age,
                f"Camera '{name}' {since} (allowed: {max_age:.2f} s){f': {trouble}' if trouble else ''}."
                " Check its cable and that its USB port is not shared.",
            )
        return frames

    def close(self) -> list[str]:
        """Close all cameras; return the names of those that are blocked and were left behind. Idempotent."""
        for thread in self.threads.values():
            thread.request_stop()
        until = time.monotonic() + CLOSE_TIMEOUT
        return [
            name
            for name, thread in self.threads.items()
            if not thread.join(max(until - time.monotonic(), 0.0))
        ]

    def __enter__(self) -> Cameras:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_cameras(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, BlockingCamera]:
    """Make LeRobot's cameras from its own configurations, ``{"type": "opencv", "index_or_path": 0, ...}``.

    Nothing is opened yet. Raises `CameraFault` for a configuration that LeRobot does not take.
    """
    import draccus
    from lerobot.cameras import CameraConfig, make_cameras_from_configs
    from lerobot.cameras.opencv import OpenCVCameraConfig  # noqa: F401, registers its type
    from lerobot.cameras.realsense import RealSenseCameraConfig  # noqa: F401
    from lerobot.cameras.zmq import ZMQCameraConfig  # noqa: F401

    cameras = {}
    for name, config in configs.items():
        try:
            decoded = draccus.decode(CameraConfig, dict(config))
            cameras |= make_cameras_from_configs({name: decoded})
        except (draccus.utils.DraccusException, ImportError, ValueError, TypeError, KeyError) as error:
            known = ", ".join(sorted(CameraConfig.get_known_choices()))
            raise CameraFault(
                f"Camera '{name}' cannot be made from {dict(config)!r} ({' '.join(str(error).split())});"
                f" types are {known}."
            ) from None
    return cameras

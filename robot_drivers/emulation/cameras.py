"""Cameras of the tabletop, drawn in a process of their own so that drawing never delays the bus.

The emulator publishes where everything is in a small shared file; this process draws it when a client asks,
one frame per request, so that in a lockstep world a frame shows exactly what the last answer of the bus told.
Run as ``python -m vla.robot_drivers.emulation.cameras SCENE SOCKET HEIGHT WIDTH``; it ends with the pipe on
its standard input. A client (`EmulatedCamera`) sends a camera's name and a line feed, and gets a header and
the pixels, or a header without pixels if there is no such camera.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import selectors
import socket
import struct
import sys
from pathlib import Path

import numpy as np

from ..faults import Disconnected

HEADER = struct.Struct("<dII")
"""Time of the scene (s), height, width."""
ANSWER_TIMEOUT = 5.0  # s; software rendering on a busy machine


class PublishedScene:
    """Time and positions of a scene in a shared file, written by one process and read by others.

    A sequence number, odd while a write is under way, keeps readers from half-written positions.
    """

    def __init__(self, path: Path):
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._values = np.frombuffer(self._map, np.float64)
        self._sequence = np.frombuffer(self._map, np.int64, count=1)

    @classmethod
    def create(cls, path: Path, size: int) -> PublishedScene:
        """Make the file for `size` positions."""
        path.write_bytes(bytes(8 * (2 + size)))
        return cls(path)

    def write(self, moment: float, qpos: np.ndarray) -> None:
        """Publish the positions (size,) at `moment` (s of the world)."""
        self._sequence[0] += 1
        self._values[1] = moment
        self._values[2:] = qpos
        self._sequence[0] += 1

    def read(self) -> tuple[float, np.ndarray]:
        """Return the newest moment and positions."""
        while True:
            before = int(self._sequence[0])
            values = self._values[1:].copy()
            if before % 2 == 0 and before == int(self._sequence[0]):
                return float(values[0]), values[1:]


class EmulatedCamera:
    """One camera of the emulated scene: a client of the camera process at the Unix socket `address`.

    Raises `Disconnected` if nobody answers there, or there is no camera of that `name`.
    """

    def __init__(self, address: str, name: str):
        self.address, self.name = address, name
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_TIMEOUT)
        try:
            self._socket.connect(address)
        except OSError as error:
            self._socket.close()
            raise Disconnected(f"There are no emulated cameras at {address} ({error}).") from None
        self.height, self.width = self.read().shape[:2]

    def read(self) -> np.ndarray:
        """Return a frame of the present scene, (height, width, 3) uint8 RGB."""
        return self.read_with_time()[0]

    def read_with_time(self) -> tuple[np.ndarray, float]:
        """Return a frame and the world's time (s) that it shows."""
        try:
            self._socket.sendall(self.name.encode() + b"\n")
            moment, height, width = HEADER.unpack(self._receive(HEADER.size))
            pixels = self._receive(3 * height * width)
        except OSError as error:
            raise Disconnected(f"The emulated camera '{self.name}' does not answer ({error}).") from None
        if not pixels:
            raise Disconnected(f"There is no emulated camera '{self.name}' at {self.address}.")
        return np.frombuffer(pixels, np.uint8).reshape(height, width, 3), moment

    def close(self) -> None:
        """Let go of the camera. Idempotent."""
        self._socket.close()

    def _receive(self, size: int) -> bytes:
        received = bytearray()
        while len(received) < size:
            part = self._socket.recv(size - len(received))
            if not part:
                raise OSError("its process ended")
            received += part
        return bytes(received)


class CameraProcess:
    """Draws what is published at `scene` for every client of `address`."""

    def __init__(self, scene: Path, address: str, height: int, width: int):
        import mujoco

        from .renderer import SceneRenderer
        from .tabletop import CAMERAS, SCENE

        self.cameras = CAMERAS
        self.scene = PublishedScene(scene)
        self.renderer = SceneRenderer(mujoco.MjModel.from_xml_path(str(SCENE)), height, width)
        self.renderer.render(self.scene.read()[1], CAMERAS[0])  # the first frame compiles shaders
        self.selector = selectors.DefaultSelector()
        self.asked: dict[socket.socket, bytes] = {}
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(address)
        self.server.listen()

    def run(self) -> None:
        """Serve until standard input ends."""
        self.selector.register(self.server, selectors.EVENT_READ)
        self.selector.register(sys.stdin.buffer, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is sys.stdin.buffer:
                    self.renderer.close()
                    return
                if key.fileobj is self.server:
                    client, _ = self.server.accept()
                    self.asked[client] = b""
                    self.selector.register(client, selectors.EVENT_READ)
                else:
                    self._answer(key.fileobj)

    def _answer(self, client: socket.socket) -> None:
        """Draw every frame that a client has asked for; forget one that left."""
        try:
            data = client.recv(4096)
        except ConnectionError:
            data = b""
        if not data:
            self.selector.unregister(client)
            del self.asked[client]
            client.close()
            return
        *names, self.asked[client] = (self.asked[client] + data).split(b"\n")
        for name in names:
            with contextlib.suppress(ConnectionError):
                client.sendall(self._frame(name.decode(errors="replace")))

    def _frame(self, name: str) -> bytes:
        moment, qpos = self.scene.read()
        if name not in self.cameras:
            return HEADER.pack(moment, 0, 0)
        frame = self.renderer.render(qpos, name)
        return HEADER.pack(moment, *frame.shape[:2]) + frame.tobytes()


if __name__ == "__main__":
    with contextlib.suppress(OSError):
        os.nice(5)  # the bus comes first
    CameraProcess(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])).run()

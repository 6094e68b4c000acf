"""The handle on an emulated bus: starts its process, steers it, and ends it."""

from __future__ import annotations

import json
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vla.errors import UserError

from ..so101.calibration import Calibration, save_calibration
from .cameras import EmulatedCamera

START_TIMEOUT = 60.0  # s; importing on a busy machine takes its time
STEER_TIMEOUT = 30.0  # s


class EmulatorError(UserError):
    """The emulator did not start, ended, or refused a request."""


class Emulator:
    """An emulated Feetech bus in its own process; a context manager.

    `port` is the serial port to open. `lockstep` is the control period (s) by which each goal advances the
    world, None for real time. `servos` describes servos 1, 2, …, each by fields of `EmulatedServo` (for
    example ``{"encoder": 1500, "falls_to": 900}``). `turnaround` (s) is the adapter's delay in real time.
    `control` is the Unix socket that steers it, and that `request` speaks to.

    With `tabletop`, a seed, the servos are those of a calibrated SO101 in MuJoCo at its rest pose, before it
    a cube and a bowl (`tabletop.Tabletop`). `calibration_file` is then LeRobot's file of that arm. `cameras`
    is the size (height, width) at which its cameras are drawn, None for an arm that nobody watches; they
    answer at the Unix socket `camera_address`.

    Raises `EmulatorError` if the process does not start or a request is refused.
    """

    def __init__(
        self,
        servos: int | Sequence[Mapping[str, Any]] = 6,
        *,
        lockstep: float | None = None,
        turnaround: float = 0.0005,
        seed: int = 0,
        tabletop: int | None = None,
        cameras: tuple[int, int] | None = None,
    ):
        if cameras is not None and tabletop is None:
            raise EmulatorError("There is nothing to see without a tabletop: give its seed as well.")
        described = [{}] * servos if isinstance(servos, int) else servos
        self._folder = Path(tempfile.mkdtemp(prefix="vla-bus-"))
        self.port = str(self._folder / "port")
        self.camera_address = str(self._folder / "cameras")
        self.calibration_file = self._folder / "so101.json"
        self.control = str(self._folder / "control")
        config = {
            "servos": [{"id": id} | dict(servo) for id, servo in enumerate(described, 1)],
            "lockstep": lockstep,
            "turnaround": turnaround,
            "seed": seed,
            "tabletop": None if tabletop is None else {"seed": tabletop},
            "scene": str(self._folder / "scene"),
            "port": self.port,
            "control": self.control,
        }
        self._processes: list[subprocess.Popen] = []
        self._connection = socket.socket(socket.AF_UNIX)
        try:
            self._start("process", json.dumps(config))
            self._connection.connect(self.control)
            if tabletop is not None:
                save_calibration(self.calibration_file, self.calibration)
            if cameras is not None:
                self._start("cameras", config["scene"], self.camera_address, *map(str, cameras))
        except (EmulatorError, OSError):
            self.close()
            raise
        self._connection.settimeout(STEER_TIMEOUT)
        self._lines = self._connection.makefile("r")

    def _start(self, module: str, *arguments: str) -> None:
        """Start a process of this package and wait for its first line."""
        # -P: the working directory must not shadow installed packages.
        command = [sys.executable, "-P", "-m", f"vla.robot_drivers.emulation.{module}", *arguments]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        self._processes.append(process)
        ready, _, _ = select.select([process.stdout], [], [], START_TIMEOUT)
        if not ready or not process.stdout.readline():
            process.kill()
            words = process.stderr.read().decode().strip().splitlines()
            raise EmulatorError(f"The emulated bus did not start: {words[-1] if words else 'no answer'}")

    @property
    def calibration(self) -> Calibration:
        """What the arm on the table is calibrated to."""
        import mujoco  # only an arm with masses needs it

        from .plant import MODEL, emulated_calibration

        return emulated_calibration(mujoco.MjModel.from_xml_path(str(MODEL)))

    def camera(self, name: str) -> EmulatedCamera:
        """Return a camera of the table, ``"top"`` or ``"wrist"``."""
        return EmulatedCamera(self.camera_address, name)

    def request(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and return its answer."""
        try:
            self._connection.sendall(json.dumps({"op": op} | arguments).encode() + b"\n")
            line = self._lines.readline()
        except OSError as error:
            raise EmulatorError(f"The emulated bus does not answer ({error}).") from None
        answer = json.loads(line) if line else {"ok": False, "error": "its process ended"}
        if not answer.pop("ok"):
            raise EmulatorError(f"The emulated bus refused '{op}': {answer['error']}")
        return answer

    def servos(self) -> dict[int, dict[str, Any]]:
        """Return every servo's world and registers, by id."""
        return {servo["id"]: servo for servo in self.request("get")["servos"]}

    def registers(self, name: str) -> list[int]:
        """Return one register of all servos, for example ``"TORQUE_ENABLE"``: the torque vector."""
        return [servo["registers"][name] for servo in self.servos().values()]

    def set(self, servo: int, **world: Any) -> None:
        """Change the world of a servo, for example ``temperature=80`` or ``registers={"LOCK": 0}``."""
        self.request("set", servo=servo, **world)

    def inject(self, kind: str, **which: Any) -> None:
        """Damage replies to come; see `line.Injection`."""
        self.request("inject", kind=kind, **which)

    def advance(self, seconds: float) -> None:
        """Let time pass in a lockstep world."""
        self.request("advance", seconds=seconds)

    def reset(self) -> None:
        """Put new servos on the bus, as described at the start, and forget every fault."""
        self.request("reset")

    def trace(self) -> list[dict[str, Any]]:
        """Return the commands since the last call, as ``{"id", "code", "parameters"}``."""
        return self.request("trace")["trace"]

    def arrange(self, seed: int) -> None:
        """Put cube and bowl where `seed` says; the arm stays as it is."""
        self.request("arrange", seed=seed)

    def look(self) -> dict[str, Any]:
        """Return ``success``, ``cube`` and ``bowl`` (m), ``angles`` (rad) and the world's ``time`` (s)."""
        return self.request("look")

    def close(self) -> None:
        """End the processes. Idempotent."""
        self._connection.close()
        if hasattr(self, "_lines"):
            self._lines.close()
        for process in self._processes:
            process.stdin.close()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
            process.stderr.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Emulator:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

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

START_TIMEOUT = 60.0  # s; importing on a busy machine takes its time
STEER_TIMEOUT = 30.0  # s


class EmulatorError(UserError):
    """The emulator did not start, ended, or refused a request."""


class Emulator:
    """An emulated Feetech bus in its own process; a context manager.

    `port` is the serial port to open. `lockstep` is the control period (s) by which each goal advances the
    world, None for real time. `servos` describes servos 1, 2, …, each by fields of `EmulatedServo` (for
    example ``{"encoder": 1500, "falls_to": 900}``). `turnaround` (s) is the adapter's delay in real time.

    Raises `EmulatorError` if the process does not start or a request is refused.
    """

    def __init__(
        self,
        servos: int | Sequence[Mapping[str, Any]] = 6,
        *,
        lockstep: float | None = None,
        turnaround: float = 0.0005,
        seed: int = 0,
    ):
        described = [{}] * servos if isinstance(servos, int) else servos
        self._folder = Path(tempfile.mkdtemp(prefix="vla-bus-"))
        self.port = str(self._folder / "port")
        control = str(self._folder / "control")
        config = {
            "servos": [{"id": id} | dict(servo) for id, servo in enumerate(described, 1)],
            "lockstep": lockstep,
            "turnaround": turnaround,
            "seed": seed,
            "port": self.port,
            "control": control,
        }
        # -P: the working directory must not shadow installed packages.
        command = [sys.executable, "-P", "-m", "vla.robot_drivers.emulation.process", json.dumps(config)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._connection = socket.socket(socket.AF_UNIX)
        try:
            self._wait_until_ready()
            self._connection.connect(control)
        except (EmulatorError, OSError):
            self.close()
            raise
        self._connection.settimeout(STEER_TIMEOUT)
        self._lines = self._connection.makefile("r")

    def _wait_until_ready(self) -> None:
        ready, _, _ = select.select([self._process.stdout], [], [], START_TIMEOUT)
        if not ready or not self._process.stdout.readline():
            self._process.kill()
            words = self._process.stderr.read().decode().strip().splitlines()
            raise EmulatorError(f"The emulated bus did not start: {words[-1] if words else 'no answer'}")

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

    def close(self) -> None:
        """End the process. Idempotent."""
        self._connection.close()
        if hasattr(self, "_lines"):
            self._lines.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._process.stderr.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Emulator:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

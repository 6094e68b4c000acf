"""The process that owns the emulated bus: a pseudo-terminal for the client, a socket for whoever steers it.

Run as ``python -m vla.robot_drivers.emulation.process CONFIG``, with the JSON that `emulator.Emulator`
writes. It prints one JSON line when it is ready and ends with its last steering connection.

In real time the servos move with the clock. In lockstep each SYNC_WRITE of goal positions advances the world
by one control period and nothing else does, which makes a run reproducible to the bit.

With a tabletop the servos drive an SO101 in MuJoCo, and its scene is published for the camera process
(`cameras`) before the reply that tells of it leaves.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import json
import os
import selectors
import socket
import struct
import sys
import time
import tty
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..so101 import registers as r
from ..so101.codec import Packet, PacketReader
from .line import STEP, EmulatedLine, Injection, is_goal, wire_time
from .servo import EmulatedServo

CATCH_UP = 12  # steps per turn at most: a late process must still answer the bus
PARTIAL_FRAME = 0.02  # s after which an unfinished command is dropped
LONELY = 30.0  # s to wait for the first steering connection
TCGETS2 = 0x802C542A
WORLD = ("encoder", "temperature", "voltage", "connected", "jammed", "frozen", "falls_to")


class Terminal:
    """A pseudo-terminal behind a stable link, which can be pulled out and plugged in again."""

    def __init__(self, link: Path):
        self.link, self.master, self._slave = link, -1, -1

    def plug(self) -> None:
        """Open a new terminal and point the link at it."""
        self.master, self._slave = os.openpty()  # the open slave keeps EIO away until a client comes
        tty.setraw(self._slave)
        os.set_blocking(self.master, False)
        temporary = self.link.with_name(self.link.name + ".new")
        os.symlink(os.ttyname(self._slave), temporary)
        os.replace(temporary, self.link)

    def pull(self) -> None:
        """Hang up, as an adapter that is unplugged."""
        self.link.unlink(missing_ok=True)
        os.close(self._slave)
        os.close(self.master)
        self.master = self._slave = -1

    def baudrate(self) -> int:
        """Return the rate that the client has set (struct termios2: c_ospeed is its last word)."""
        return struct.unpack("11I", fcntl.ioctl(self.master, TCGETS2, bytes(44)))[10]


class EmulatorProcess:
    """The event loop: bytes in, replies out at their time, the world in between, and steering."""

    def __init__(self, config: dict[str, Any]):
        self.config = config
        self.tabletop = self.published = None
        if config["tabletop"] is not None:
            from .cameras import PublishedScene  # MuJoCo is imported where there are masses to move
            from .tabletop import Tabletop

            self.tabletop = Tabletop(config["tabletop"]["seed"])
            self.published = PublishedScene.create(Path(config["scene"]), self.tabletop.model.nq)
        self.line = self._new_line()
        self.period = config["lockstep"]  # s per goal, None in real time
        self.turnaround = config["turnaround"]
        self.terminal = Terminal(Path(config["port"]))
        self.selector = selectors.DefaultSelector()
        self.reader = PacketReader()
        self.outgoing: list[tuple[float, int, bytes]] = []
        self.order = itertools.count()
        self.world = self.last_byte = time.monotonic()
        self.steering: dict[socket.socket, bytes] = {}
        self.seen_steering = False
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(config["control"])
        self.server.listen()
        self.selector.register(self.server, selectors.EVENT_READ, self._accept)

    def run(self) -> None:
        """Serve until nobody steers any more."""
        self._plug()
        print(json.dumps({"ready": True}), flush=True)
        begin = time.monotonic()
        while self.steering or (not self.seen_steering and time.monotonic() - begin < LONELY):
            timeout = 0.02
            if self.outgoing:
                timeout = min(max(self.outgoing[0][0] - time.monotonic(), 0.0), timeout)
            for key, _ in self.selector.select(timeout):
                key.data(key.fileobj)
            self._catch_up()
            self._send_due()

    def _new_line(self) -> EmulatedLine:
        if self.tabletop is not None:
            self.tabletop.reset(self.config["tabletop"]["seed"])
            self._publish()
            return EmulatedLine(seed=self.config["seed"], world=self.tabletop)
        return EmulatedLine([EmulatedServo(**servo) for servo in self.config["servos"]], self.config["seed"])

    def _plug(self) -> None:
        self.terminal.plug()
        self.selector.register(self.terminal.master, selectors.EVENT_READ, self._receive)

    def _pull(self) -> None:
        self.selector.unregister(self.terminal.master)
        self.terminal.pull()
        self.outgoing.clear()

    def _catch_up(self) -> None:
        """In real time, bring the world nearer to the clock."""
        if self.period is not None:
            return
        for _ in range(CATCH_UP):
            if self.world + STEP > time.monotonic():
                break
            self.line.tick(STEP)
            self.world += STEP
        self._publish()

    def _publish(self) -> None:
        """Let the cameras see where everything is."""
        if self.published is not None:
            self.published.write(self.tabletop.data.time, self.tabletop.data.qpos)

    def _receive(self, master: int) -> None:
        try:
            data = os.read(master, 4096)
        except OSError:  # the client has just closed its end
            return
        now = time.monotonic()
        if now - self.last_byte > PARTIAL_FRAME:
            self.reader.clear()
        self.last_byte = now
        baudrate = self.terminal.baudrate()
        for command in self.reader.feed(data):
            self._carry_out(command, now, baudrate)

    def _carry_out(self, command: Packet, now: float, baudrate: int) -> None:
        if self.period is not None and is_goal(command):
            replies = self.line.answer(command, baudrate)
            self._advance(self.period)
        else:
            replies = self.line.answer(command, baudrate)
        due = now
        if self.period is None:
            due += self.turnaround + wire_time(len(command.encode()), baudrate)
        for reply in replies:
            if self.period is None:
                due += wire_time(len(reply.wire), baudrate)
            heapq.heappush(self.outgoing, (due + reply.late, next(self.order), reply.wire))
        self._send_due()

    def _send_due(self) -> None:
        while self.outgoing and self.outgoing[0][0] <= time.monotonic():
            wire = heapq.heappop(self.outgoing)[2]
            if self.terminal.master >= 0:
                with contextlib.suppress(BlockingIOError):  # nobody reads: the adapter's buffer is full
                    os.write(self.terminal.master, wire)

    def _advance(self, seconds: float) -> None:
        self.line.advance(seconds)
        self._publish()

    def _accept(self, server: socket.socket) -> None:
        connection, _ = server.accept()
        self.steering[connection] = b""
        self.seen_steering = True
        self.selector.register(connection, selectors.EVENT_READ, self._steer)

    def _steer(self, connection: socket.socket) -> None:
        """Answer whole lines; a connection that ends is dropped."""
        try:
            data = connection.recv(65536)
        except ConnectionError:
            data = b""
        if not data:
            self.selector.unregister(connection)
            del self.steering[connection]
            connection.close()
            return
        *lines, self.steering[connection] = (self.steering[connection] + data).split(b"\n")
        for line in lines:
            try:
                answer = {"ok": True} | (self._obey(json.loads(line)) or {})
            except (ValueError, KeyError, TypeError) as error:
                answer = {"ok": False, "error": repr(error)}
            with contextlib.suppress(ConnectionError):  # whoever asked has left
                connection.sendall(json.dumps(answer).encode() + b"\n")

    def _obey(self, request: dict[str, Any]) -> dict[str, Any] | None:
        match request.pop("op"):
            case "get":
                return {"servos": [self._describe(servo) for servo in self.line.servos.values()]}
            case "set":
                self._set(**request)
            case "line":
                self.line.echo = request.get("echo", self.line.echo)
                self.line.mute = request.get("mute", self.line.mute)
            case "inject":
                self.line.injections.append(Injection(**request))
            case "clear":
                self.line.injections.clear()
            case "power":
                for servo in self.line.servos.values():
                    servo.set_power(request["on"])
            case "advance":
                self._advance(request["seconds"])
            case "reset":
                self.line = self._new_line()
                self.outgoing.clear()
            case "hangup":
                self._pull()
            case "replug":
                self._plug()
            case "trace":
                packets = [
                    asdict(packet) | {"parameters": list(packet.parameters)} for packet in self.line.trace
                ]
                self.line.trace.clear()
                return {"trace": packets}
            case "arrange":
                self._tabletop().arrange(self._tabletop().layout(request["seed"]))
                self._publish()
            case "payload":
                self._tabletop().plant.payload = float(request["mass"])
            case "pose":
                self._tabletop().plant.pose(request["angles"])
            case "look":
                return self._look()
            case unknown:
                raise ValueError(f"unknown op {unknown!r}")
        return None

    def _tabletop(self):
        if self.tabletop is None:
            raise ValueError("this world has no tabletop")
        return self.tabletop

    def _look(self) -> dict[str, Any]:
        table = self._tabletop()
        return {
            "success": table.success,
            "cube": table.cube_pose[0].tolist(),
            "bowl": table.bowl_position.tolist(),
            "angles": table.plant.angles().tolist(),
            "height": table.plant.height,
            "time": table.data.time,
        }

    def _describe(self, servo: EmulatedServo) -> dict[str, Any]:
        servo.sense()
        world = {name: getattr(servo, name) for name in (*WORLD, "id", "powered", "velocity")}
        return world | {"registers": {name: servo.get(it) for name, it in r.BY_NAME.items()}}

    def _set(self, servo: int, registers: dict[str, int] | None = None, **world: Any) -> None:
        it = self.line.servos[servo]
        for name, value in world.items():
            if name not in WORLD:
                raise ValueError(f"a servo has no {name!r}, only {', '.join(WORLD)}")
            if name == "encoder" and self.tabletop is not None:
                raise ValueError("a motor's encoder follows its joint and cannot be set")
            setattr(it, name, value)
        for name, value in (registers or {}).items():
            it.put(r.BY_NAME[name], value)


if __name__ == "__main__":
    EmulatorProcess(json.loads(sys.argv[1])).run()

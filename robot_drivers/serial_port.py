"""Serial ports of this machine: which there are, who holds them, and why one cannot be opened."""

from __future__ import annotations

import errno
import grp
import os
import stat
from pathlib import Path


def serial_ports() -> list[str]:
    """Return the ports of plugged-in USB adapters, by names that survive re-plugging where there are any."""
    from serial.tools.list_ports import comports

    stable = {
        os.path.realpath(link): str(link) for link in sorted(Path("/dev/serial/by-id").glob("*"))
    }  # absent without udev
    found = sorted(port.device for port in comports() if port.vid is not None)
    return [stable.get(os.path.realpath(port), port) for port in found]


def holders(port: str) -> list[str]:
    """Return the programs that have the port open, as far as this user may see, as ``"1234 (python)"``."""
    found = []
    target = os.path.realpath(port)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int(process.name) != os.getpid() and any(
                os.readlink(handle) == target for handle in (process / "fd").iterdir()
            ):
                found.append(f"{process.name} ({(process / 'comm').read_text().strip()})")
        except OSError:  # not ours to look into, or just ended
            continue
    return found


def why_not_open(port: str, error: Exception) -> str:
    """Return one sentence on why `port` cannot be opened, and the remedy. `error` is what opening raised."""
    number = getattr(error, "errno", None)
    cannot = f"The serial port {port} cannot be opened"
    if number == errno.ENOENT or not os.path.exists(port):
        others = serial_ports()
        found = f"found instead: {', '.join(others)}" if others else "no adapter is plugged in"
        return f"{cannot}: it does not exist ({found}). Check the USB cable, or name the right port."
    if not stat.S_ISCHR(os.stat(port).st_mode):
        return f"{cannot}: it is not a serial port but a file or a folder. Name a port such as /dev/ttyACM0."
    if number in (errno.EACCES, errno.EPERM):
        group = _group(port)
        return (
            f"{cannot}: this user has no permission. Run `sudo usermod -aG {group} $USER`, log out and in"
            f" again; for this session alone `sudo chmod a+rw {port}` will do."
        )
    if number in (errno.EAGAIN, errno.EBUSY):
        by = holders(port)
        who = f"process {', '.join(by)} holds it" if by else "another program holds it"
        return f"{cannot}: {who}. End that program first."
    return f"{cannot} ({error}). Is the adapter plugged in, and does no other program hold the port?"


def _group(port: str) -> str:
    try:
        return grp.getgrgid(os.stat(port).st_gid).gr_name
    except KeyError:
        return "dialout"

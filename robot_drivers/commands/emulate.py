"""`vla robot emulate`: an SO101 without hardware, at a serial port that LeRobot and `vla` can open."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from vla.errors import UserError

from ..emulation import Emulator
from ..so101.calibration import calibration_path, load_calibration, save_calibration


@dataclass(frozen=True)
class EmulateConfig:
    """Emulate an SO101 at its rest pose, with a cube and a bowl before it, until Ctrl-C."""

    so101: bool = False
    """Emulate an SO101, the only arm that can be emulated."""
    link: Path | None = None
    """Also make the port available under this name."""
    id: str = "emulated"
    """Name of the arm: its calibration is written to ID.json."""
    calibration_dir: Path | None = None
    """Folder of the calibration; LeRobot's own by default."""
    seed: int = 0
    """Where cube and bowl stand."""
    lockstep: float | None = None
    """Let each goal advance the world by so many seconds, instead of the clock."""
    cameras: bool = False
    """Draw the cameras `top` and `wrist` at a socket."""
    image_size: int = 256
    """Height and width of their frames: what the policy was trained on."""
    json: bool = False
    """Print JSON instead of words."""


def emulate(config: EmulateConfig) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    if not config.so101:
        raise UserError("Say which arm: `vla robot emulate --so101`.")
    file = calibration_path(config.id, config.calibration_dir)
    if config.image_size < 16:
        raise UserError(f"--image-size is {config.image_size}; give at least 16 pixels.")
    size = (config.image_size, config.image_size) if config.cameras else None
    with Emulator(tabletop=config.seed, lockstep=config.lockstep, cameras=size) as emulator:
        _keep_calibration(file, emulator)
        if config.link is not None:
            _link(config.link, emulator.port)
        try:
            _say(config, file, emulator)
            while True:
                emulator.servos()  # raises when its process has ended
                time.sleep(1.0)
        except KeyboardInterrupt:  # the way to end it: nothing went wrong
            return
        finally:
            if config.link is not None:
                config.link.unlink(missing_ok=True)


def _keep_calibration(file: Path, emulator: Emulator) -> None:
    """Write the emulated arm's calibration, unless the file is of another arm."""
    if file.exists() and load_calibration(file) != emulator.calibration:
        raise UserError(f"{file} is the calibration of another arm: give the emulated one another --id.")
    save_calibration(file, emulator.calibration)


def _link(link: Path, port: str) -> None:
    if link.is_symlink() and not link.exists():
        link.unlink()  # of an emulated arm that was killed
    try:
        link.symlink_to(port)
    except OSError as error:
        raise UserError(f"The port cannot be linked at {link} ({error}).") from None


def _say(config: EmulateConfig, file: Path, emulator: Emulator) -> None:
    port = emulator.port if config.link is None else str(config.link)
    said = {
        "port": port,
        "id": config.id,
        "calibration": str(file),
        "control": emulator.control,
        "cameras": emulator.camera_address if config.cameras else None,
    }
    if config.json:
        print(json.dumps(said), flush=True)
        return
    print(
        f"An emulated SO101 is at {port} until Ctrl-C.\n"
        f"  vla robot check --port {port} --id {config.id}\n"
        f"  LeRobot: --robot.type=so101_follower --robot.port={port} --robot.id={config.id}"
        + ("" if config.calibration_dir is None else f" --robot.calibration_dir={file.parent}"),
        flush=True,
    )

"""`vla robot calibrate`: teach an arm its middle and its ranges, or carry a calibration to or from it."""

from __future__ import annotations

import contextlib
import select
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vla.errors import UserError

from ..so101.bus import FeetechBus
from ..so101.calibrating import Sweep, centre, finish, read_calibration, require_limp, write_calibration
from ..so101.calibration import JOINTS, Calibration, load_calibration, save_calibration
from ..so101.diagnosis import BAUD_RATE, models, presence
from .options import ArmOptions

LOOK_EVERY = 0.02  # s


@dataclass(frozen=True)
class CalibrateConfig(ArmOptions):
    """Calibrate an SO101 by hand, or without a person from a file or from what its servos carry."""

    from_file: Path | None = None
    """Write this calibration (LeRobot's file) into the servos, and keep it as ID.json."""
    from_servos: bool = False
    """Write ID.json from what the servos carry: they were calibrated on another computer."""


def calibrate(config: CalibrateConfig) -> None:
    """Calibrate, and keep the file. Nothing is moved by the arm itself."""
    if config.from_file is not None and config.from_servos:
        raise UserError("Give either --from-file or --from-servos: a calibration comes from one of them.")
    known = None if config.from_file is None else load_calibration(config.from_file)
    by_hand = known is None and not config.from_servos
    if by_hand and not sys.stdin.isatty():
        raise UserError(
            "Calibrating by hand needs a terminal; without one use --from-file FILE or --from-servos."
        )
    with _limp_arm(config, known) as bus:
        if known is not None:
            write_calibration(bus, known)
        elif config.from_servos:
            known = read_calibration(bus)
        else:
            known = by_hand_calibration(bus, _ask, _enter_pressed, _show)
            write_calibration(bus, known)
    save_calibration(config.calibration_file, known)
    print(f"The calibration is in {config.calibration_file} and in the servos; LeRobot uses the same file.")


def by_hand_calibration(
    bus: FeetechBus,
    ask: Callable[[str], None],
    stop: Callable[[float], bool],
    show: Callable[[Sweep], None],
) -> Calibration:
    """Ask a person to move the joints, and return what was found. `stop` waits so many seconds for ENTER."""
    ask("Hold the arm with every joint in the middle of its range, then press ENTER. ")
    offsets = centre(bus)
    print("Move every joint but the wrist's roll slowly from one stop to the other, then press ENTER.")
    sweep = Sweep()
    while True:
        sweep.look(bus)
        show(sweep)
        if stop(LOOK_EVERY):
            return finish(bus, offsets, sweep)


@contextlib.contextmanager
def _limp_arm(config: CalibrateConfig, known: Calibration | None) -> Iterator[FeetechBus]:
    """Yield the bus of an arm that is complete and has no torque."""
    ids = {name: known[name].id if known else id for id, name in enumerate(JOINTS, 1)}
    bus = FeetechBus(config.find_port(), ids, baudrate=BAUD_RATE, reply_timeout=config.timeout)
    bus.open()
    try:
        for look in (presence, models):
            finding = look(bus)
            if finding.remedy:
                raise UserError(f"Not calibrated: {finding.found}. {finding.remedy}")
        require_limp(bus)
        yield bus
    finally:
        bus.close()


def _ask(question: str) -> None:
    try:
        input(question)
    except EOFError:
        raise UserError("Not calibrated: the terminal was closed.") from None


def _enter_pressed(seconds: float) -> bool:
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    if ready:
        sys.stdin.readline()
        print()
    return bool(ready)


def _show(sweep: Sweep) -> None:
    """One line that is written over: each joint's present position and range."""
    parts = [f"{n} {sweep.now.get(n, 0)} [{sweep.low.get(n, 0)}, {sweep.high.get(n, 0)}]" for n in JOINTS]
    print("\r" + "  ".join(parts), end="\x1b[K", flush=True)

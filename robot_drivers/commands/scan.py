"""`vla robot scan`: which servos answer, at which port, at which rate. Moves nothing, changes nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from vla.errors import UserError

from ..faults import DriverFault
from ..serial_port import serial_ports
from ..so101 import registers as r
from ..so101.diagnosis import SCAN_TIMEOUT, SCANNED_IDS, FoundServo, scan_port


@dataclass(frozen=True)
class ScanConfig:
    """Look for Feetech servos at every port and rate."""

    port: str | None = None
    """Look at this port alone; by default at every USB serial adapter."""
    ids: int = SCANNED_IDS.stop - 1
    """Highest servo id to ask for."""
    timeout: float = SCAN_TIMEOUT
    """Seconds that a servo has for its answer."""
    json: bool = False
    """Print JSON instead of a table."""


def scan(config: ScanConfig) -> None:
    """Print what answers. Raises `UserError` if nothing does."""
    if not 1 <= config.ids <= 253 or not config.timeout > 0:
        raise UserError("Give a highest id from 1 to 253 and a timeout above 0.")
    ports = [config.port] if config.port else serial_ports()
    if not ports:
        raise UserError("No USB serial adapter is plugged in: connect the arm, or name its --port.")
    found: list[FoundServo] = []
    troubles: list[str] = []
    for port in ports:
        try:
            found += scan_port(port, r.BAUD_RATES, range(1, config.ids + 1), config.timeout)
        except DriverFault as fault:
            troubles.append(str(fault))
    if config.json:
        print(json.dumps({"servos": [asdict(servo) for servo in found], "troubles": troubles}))
    elif found:
        _print(found)
    if troubles:
        raise UserError(" ".join(troubles))
    if not found:
        raise UserError(
            f"No servo answers at {', '.join(ports)}: switch the motor supply on (USB alone does not feed the"
            " servos), and check the cable from the adapter to servo 1."
        )


def _print(found: list[FoundServo]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in ("port", "baud", "id", "model", "firmware", "torque", "position", "V", "°C", "status"):
        table.add_column(column)
    for it in found:
        model = "STS3215" if it.model == r.MODEL_STS3215 else str(it.model)
        cells = (it.port, it.baudrate, it.id, model, it.firmware, it.torque, it.position, it.voltage)
        table.add_row(*map(str, cells), str(it.temperature), ", ".join(it.conditions) or "well")
    Console().print(table)

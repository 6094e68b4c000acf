"""`vla robot check`: is the arm fit to work? Looks at everything, moves nothing, says what to do."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from vla.errors import UserError

from ..faults import NotCalibrated
from ..so101.calibration import load_calibration
from ..so101.diagnosis import Finding, examine
from .options import ArmOptions


@dataclass(frozen=True)
class CheckConfig(ArmOptions):
    """Examine an SO101: port, servos, firmware, calibration, supply, temperature, torque, line."""

    json: bool = False
    """Print JSON instead of a table."""


def check(config: CheckConfig) -> None:
    """Print the findings; raise `UserError` if one of them keeps the arm from working."""
    try:
        calibration = load_calibration(config.calibration_file)
    except NotCalibrated as fault:
        calibration = fault
    findings = examine(config.find_port(), calibration, config.timeout)
    if config.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    else:
        _print(findings)
    wrong = [finding for finding in findings if finding.remedy]
    if len(wrong) == 1:
        raise UserError(wrong[0].remedy)
    if wrong:
        raise UserError(f"The arm is not fit to work: {', '.join(it.what for it in wrong)} (see above).")


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("", "check", "found"):
        table.add_column(header)
    for finding in findings:
        table.add_row("[red]x[/]" if finding.remedy else "[green]ok[/]", finding.what, finding.found)
    console.print(table)
    for finding in findings:
        if finding.remedy:
            console.print(f"\n[bold]{finding.what}:[/] {finding.remedy}", highlight=False)

"""`vla robot rest`: take hold of the arm where it is, lay it down slowly, release it."""

from __future__ import annotations

from dataclasses import dataclass

from vla.errors import UserError

from ..arm import Arm
from .options import ArmOptions


@dataclass(frozen=True)
class RestConfig(ArmOptions):
    """Bring an SO101 to rest and release it, for example one that a killed program left standing."""


def rest(config: RestConfig) -> None:
    """Lay the arm down. Raises `UserError` if it was not seen at rest, or a joint may still hold."""
    with Arm(config.arm_config()) as arm:
        arm.open()
        arm.enable()
        ending = arm.close()
    if ending is None or not ending.at_rest or ending.unreleased:
        raise UserError("The arm's process was killed." if ending is None else ending.sentence)
    print(ending.sentence)

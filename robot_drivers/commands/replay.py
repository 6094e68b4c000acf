"""`vla robot replay`: drive a recorded run again, through the safety filter, and end at rest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..arm import Arm
from ..recorder import read_record
from ..replay import replay, track
from .options import ArmOptions, Bounds


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(ArmOptions):
    """Drive a record of an SO101 again."""

    record: Annotated[Path, tyro.conf.Positional]
    """File that a recorded run left."""
    speed: float = 1.0
    """Times as fast; what the arm cannot do is slowed down by its safety filter."""
    save: Path | None = None
    """Record this run, too."""
    workspace: Annotated[Bounds | None, tyro.conf.arg(metavar="X0 X1 Y0 Y1 Z0 Z1")] = None
    """Box for the gripper in metres: x forwards from the arm's base, y to its left, z up from its foot."""
    dry_run: bool = False
    """Say what would be driven, and connect to nothing."""


def replay_record(config: ReplayConfig) -> None:
    """Drive the record and say how closely the arm followed."""
    record = read_record(config.record)
    path = track(record)
    names = record.info.joint_names
    if config.dry_run:
        print(f"{len(path.times)} goals in {path.duration:.1f} s:")
        for name, low, high in zip(names, path.goals.min(axis=0), path.goals.max(axis=0), strict=True):
            print(f"  {name:14} {low:8.3f} to {high:8.3f}")
        return
    with Arm(config.arm_config(record=config.save, workspace=config.workspace)) as arm:
        arm.open()
        arm.enable()
        done = replay(record, arm, config.speed)
        ending = arm.close()
    furthest = int(done.deviation.argmax())
    print(
        f"Driven in {done.duration:.1f} s; '{names[furthest]}' was furthest from its goals, by"
        f" {done.deviation[furthest]:.3f}. The filter changed {done.interventions} of them."
    )
    print(ending.sentence)

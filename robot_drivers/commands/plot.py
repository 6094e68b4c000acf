"""`vla robot plot`: a recorded run as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from ..record_plot import draw_record, first_faults
from ..recorder import Record, read_record


@dataclass(frozen=True)
class PlotConfig:
    """Draw what an arm was asked, what it was sent and what it measured."""

    record: Annotated[Path, tyro.conf.Positional]
    """File that a recorded run left, whole or `.partial`."""
    out: Path | None = None
    """Picture to write, .png, .pdf or .svg; next to the record if not given."""


def plot_record(config: PlotConfig) -> None:
    """Draw the record, and say in words what stands out."""
    record = read_record(config.record)
    out = config.out or config.record.with_name(f"{config.record.name.partition('.')[0]}.png")
    draw_record(record, out, str(config.record))
    for line in summary(record):
        print(line)
    print(f"Drawn in {out}.")


def summary(record: Record) -> list[str]:
    """Return what stands out: duration, rate, misses, the filter's work, the furthest joint, faults."""
    cycles, times = record.cycles, record.times
    seconds = float(times[-1] - times[0])
    pace = f" at {(len(cycles) - 1) / seconds:.1f} Hz" if seconds > 0 else ""
    missed = sum(not cycle.fresh for cycle in cycles)
    changed = sum(bool(cycle.interventions) for cycle in cycles)
    lines = [
        f"{len(cycles)} control periods in {seconds:.1f} s{pace}; {missed} without a sample;"
        f" the filter acted in {changed}."
    ]
    behind = np.abs(record.sent - record.measured) / (record.info.upper - record.info.lower)
    if np.isfinite(behind).any():
        furthest = int(np.nanargmax(np.where(np.isfinite(behind), behind, -1).max(axis=0)))
        share = float(np.nanmax(behind[:, furthest]))
        lines.append(
            f"'{record.info.joint_names[furthest]}' was furthest from its command, by {share:.1%} of its"
            " range."
        )
    return [*lines, *(f"Fault at {time:.2f} s: {sentence}" for time, sentence in first_faults(record))]

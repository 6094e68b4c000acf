"""A record as a picture: per joint what was asked, sent and measured; below, how often; behind, the mode.

asked       what the policy wanted, before the filter
sent        what the filter made of it
measured    where the joint was
ticks       at the lower edge: cycles in which the filter changed what this joint was asked
red lines   the first cycle of every fault, numbered; the sentences stand below
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vla.atomic import write_bytes
from vla.errors import UserError

from .driver import Unit
from .recorder import Record
from .supervisor import Mode

SHOWN: dict[Unit, tuple[str, float]] = {
    "rad": ("°", 180 / math.pi),
    "fraction": ("%", 100.0),
    "m": ("mm", 1000.0),
}
"""In which unit a joint is drawn, and how many of it one of the driver's is."""

COLOURS = {
    Mode.OPEN: "0.85",
    Mode.HOLD: "0.93",
    Mode.REST: "lightblue",
    Mode.FAULT: "lightsalmon",
    Mode.LOST: "red",
}
"""Backgrounds; an arm that follows has none."""

BIN = 0.25
"""Seconds over which rates are counted."""

LINE_WIDTH = 120  # characters of a fault's sentence


@dataclass(frozen=True)
class Span:
    """A stretch of one mode, `begin` to `end` in s since the record began."""

    mode: Mode
    begin: float
    end: float


def draw_record(record: Record, out: Path, title: str = "") -> Path:
    """Draw `record` into the file `out`, whose ending says the format; return its path.

    Raises `UserError` for an ending that cannot be drawn, a record of nothing, and a disk that refuses.
    """
    figure = record_figure(record, title)
    known = figure.canvas.get_supported_filetypes()
    if (kind := out.suffix.removeprefix(".").lower()) not in known:
        raise UserError(f"{out} cannot be drawn: name a file that ends in .{', .'.join(sorted(known))}.")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=kind)
    try:
        return write_bytes(out, picture.getvalue())
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}).") from None


def record_figure(record: Record, title: str = "") -> Figure:
    """Return the picture: one panel per joint and one of rates, over seconds since the record began."""
    if not record.cycles:
        raise UserError("The record holds no control period: there is nothing to draw.")
    joints, faults = record.info.joints, first_faults(record)
    figure = Figure(figsize=(11, 1.5 * (len(joints) + 1) + 0.9), layout="constrained")
    panels = figure.subplots(len(joints) + 1, 1, sharex=True)
    for index in range(len(joints)):
        _draw_joint(panels[index], record, index)
    _draw_rates(panels[-1], record)
    stretches = spans(record)
    for panel in panels:
        for it in stretches:
            if it.mode in COLOURS:
                panel.axvspan(it.begin, it.end, color=COLOURS[it.mode], zorder=0, linewidth=0)
        for time, _ in faults:
            panel.axvline(time, color="red", linewidth=1)
    for number, (time, _) in enumerate(faults, 1):
        panels[0].annotate(str(number), (time, 1), xycoords=("data", "axes fraction"), color="red")
    handles, labels = panels[0].get_legend_handles_labels()
    seen = [mode for mode in COLOURS if any(it.mode is mode for it in stretches)]
    handles += [Patch(color=COLOURS[mode]) for mode in seen]
    figure.legend(handles, [*labels, *(mode.value for mode in seen)], loc="outside upper center", ncols=8)
    panels[0].set_title(title, loc="left", fontsize="small")
    panels[-1].set_xlabel("\n".join(["time (s)", *_sentences(faults)]), color="black")
    return figure


def spans(record: Record) -> list[Span]:
    """Return the stretches of one mode, in their order; each lasts until the next begins."""
    begin, found = record.cycles[0].time, []
    for mode, run in itertools.groupby(record.cycles, key=lambda cycle: cycle.mode):
        cycles = list(run)
        if found:
            found[-1] = Span(found[-1].mode, found[-1].begin, cycles[0].time - begin)
        found.append(Span(mode, cycles[0].time - begin, cycles[-1].time - begin))
    return found


def first_faults(record: Record) -> list[tuple[float, str]]:
    """Return when each fault was first latched (s since the record began), and its sentence."""
    found: list[tuple[float, str]] = []
    before = None
    for cycle in record.cycles:
        sentence = None if cycle.fault is None else str(cycle.fault)
        if sentence is not None and sentence != before:
            found.append((cycle.time - record.cycles[0].time, sentence))
        before = sentence
    return found


def rate(times: np.ndarray, duration: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the middles (s) of equal bins of about `BIN` s over `duration`, and the events per s in each."""
    bins = max(round(duration / BIN), 1)
    counts, edges = np.histogram(times, bins, (0.0, max(duration, BIN)))
    return (edges[:-1] + edges[1:]) / 2, counts / np.diff(edges)


def new_setpoints(record: Record) -> np.ndarray:
    """Return the cycles (T,) in which something was asked that differs from the cycle before."""
    asked = [None, *(cycle.asked for cycle in record.cycles)]
    return np.array([now is not None and now != then for then, now in itertools.pairwise(asked)], bool)


def _draw_joint(panel, record: Record, index: int) -> None:
    """Draw one joint's asked, sent and measured positions."""
    joint, times = record.info.joints[index], record.times - record.times[0]
    unit, scale = SHOWN[joint.unit]
    for name, style in (
        ("asked", {"color": "tab:orange", "linewidth": 1.0, "drawstyle": "steps-post"}),
        ("sent", {"color": "tab:blue", "linewidth": 1.0, "drawstyle": "steps-post"}),
        ("measured", {"color": "black", "linewidth": 1.2}),
    ):
        panel.plot(times, scale * getattr(record, name)[:, index], label=name, **style)
    low, high = panel.get_ylim()
    changed = [joint.name in it.interventions or "setpoint" in it.interventions for it in record.cycles]
    if any(changed):
        ticks = times[np.array(changed)]
        panel.plot(ticks, np.full(len(ticks), low), "|", color="tab:red", label="changed by the filter")
    for limit in (scale * joint.lower, scale * joint.upper):
        panel.axhline(limit, color="0.5", linestyle=":", linewidth=1)
    panel.set_ylim(low, high)  # a limit is drawn where the joint came near it
    panel.set_ylabel(f"{joint.name}\n({unit})", fontsize="small")
    panel.grid(alpha=0.3)


def _draw_rates(panel, record: Record) -> None:
    """Draw how often the arm was served, gave a sample, and was asked something new."""
    times = record.times - record.times[0]
    fresh = np.array([cycle.fresh for cycle in record.cycles], bool)
    for name, chosen, colour in (
        ("cycles", np.ones(len(times), bool), "tab:green"),
        ("samples", fresh, "black"),
        ("new setpoints", new_setpoints(record), "tab:orange"),
    ):
        panel.plot(*rate(times[chosen], float(times[-1])), color=colour, label=name, linewidth=1.2)
    panel.axhline(record.info.control_rate, color="0.5", linestyle=":", linewidth=1)
    panel.set(ylim=(0, None), ylabel="rate (Hz)")
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right", fontsize="small", ncols=3)


def _sentences(faults: list[tuple[float, str]]) -> list[str]:
    """Return the faults as lines that fit below the picture."""
    said = [f"{number}: at {time:.2f} s: {words}" for number, (time, words) in enumerate(faults, 1)]
    return [line for sentence in said for line in textwrap.wrap(sentence, LINE_WIDTH)]

"""The picture of a run: training and held-out loss, and success where it has been evaluated."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from vla.atomic import write_bytes
from vla.training.metrics import METRICS_FILE, Row, read_metrics

CURVES_FILE = "curves.png"


def draw_curves(out: Path) -> Path:
    """Draw ``curves.png`` of the run in `out` from its metrics and evaluations; return its path."""
    rows = read_metrics(out / METRICS_FILE)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, label, style in (("train", "training", "-"), ("held_out", "held out (averaged weights)", "o-")):
        chosen = [row for row in rows if row["kind"] == kind]
        if chosen:
            axes.plot(*_columns(chosen, "loss"), style, label=label, markersize=3, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=out.resolve().name)
    axes.grid(alpha=0.3, which="both")
    _draw_success(axes, success_points(out))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    return write_bytes(out / CURVES_FILE, picture.getvalue())


def success_points(out: Path) -> list[tuple[int, float, float, float]]:
    """Return ``(step, rate, low, high)`` of every evaluation that `vla eval` has left inside `out`."""
    points = []
    for path in out.glob("**/summary.json"):
        summary = json.loads(path.read_text())
        manifest, total = summary["provenance"]["manifest"], summary["total"]
        if total["episodes"] and "step" in manifest:  # a run without valid episodes has no rate
            points.append((manifest["step"], total["rate"], *total["interval"]))
    return sorted(points)


def _draw_success(axes, points: list[tuple[int, float, float, float]]) -> None:
    if not points:
        return
    right = axes.twinx()
    steps, rates, low, high = np.array(points).T
    right.plot(steps, rates, "s", color="tab:green")
    right.vlines(steps, low, high, color="tab:green")
    right.set(ylabel="success (95 % interval)", ylim=(0, 1))
    right.yaxis.label.set_color("tab:green")


def _columns(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    return [row["step"] for row in rows], [row[name] for row in rows]

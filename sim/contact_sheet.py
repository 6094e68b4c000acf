"""One picture of a dataset: the first frame of every task, both cameras."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from matplotlib.figure import Figure

CONTACT_SHEET = "contact_sheet.png"
COLUMNS = 5


def draw_contact_sheet(demonstrations: Sequence[tuple[str, Path]], root: Path) -> Path:
    """Draw the first frame of one demonstration per task into ``root/contact_sheet.png``.

    `demonstrations` are pairs of an instruction and a folder that holds one video per camera.
    """
    rows = -(-len(demonstrations) // COLUMNS)
    columns = min(COLUMNS, len(demonstrations))
    figure = Figure(figsize=(3.2 * columns, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (instruction, folder) in zip(axes, demonstrations, strict=False):
        videos = sorted(folder.glob("*.mp4"))
        axis.imshow(np.concatenate([_first_frame(video) for video in videos], axis=1))
        axis.set_title("\n".join(textwrap.wrap(instruction, 40)), fontsize=8)
    path = root / CONTACT_SHEET
    figure.savefig(path, dpi=120)
    return path


def _first_frame(video: Path) -> np.ndarray:
    with av.open(str(video)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")

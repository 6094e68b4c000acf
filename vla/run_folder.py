"""Where a training run keeps its newest checkpoint."""

from __future__ import annotations

from pathlib import Path

#: Seen from the folders that name it: itself, a numbered checkpoint, all checkpoints, the run.
_PLACES = ("", "pretrained_model", "last/pretrained_model", "checkpoints/last/pretrained_model")


def find_newest(path: Path, file: str) -> Path | None:
    """Return the folder with `file` that `path` means (itself, a checkpoint, a training run), or None."""
    return next((Path(path) / place for place in _PLACES if (Path(path) / place / file).is_file()), None)

"""The evaluation folder: what may be in it, and who may write to it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vla.errors import UserError

#: Everything that an evaluation writes; `--overwrite` removes these and nothing else.
OUTPUTS = ("plan.json", "episodes.jsonl", "summary.json", "report.html", "videos", "routing")


@contextlib.contextmanager
def output_folder(folder: Path, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Make `folder` and hold it for this process alone.

    Raises `UserError` if it has contents and neither `resume` nor `overwrite` is set, if both are, or
    if another process is writing to it. The lock ends with the process, however that ends.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite contradict each other; choose one.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder.")
    if folder.exists() and any(folder.iterdir()) and not (resume or overwrite):
        raise UserError(
            f"The output folder {folder} already exists; use --resume to go on with it, --overwrite to "
            "start again, or another --out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another evaluation is writing to {folder}; wait for it or stop it.") from None
        if overwrite:
            _remove_outputs(folder)
        yield folder
    finally:
        os.close(descriptor)


def _remove_outputs(folder: Path) -> None:
    for name in OUTPUTS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

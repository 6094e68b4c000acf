"""Checkpoint folders that are complete or not there.

``OUT/checkpoints/000500/{pretrained_model,training_state}`` and the link ``last``, as LeRobot lays them
out. A checkpoint is written beside its final name and renamed, so that a kill at any moment leaves the
previous one usable.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from lerobot.common.train_utils import get_step_identifier
from lerobot.utils.constants import CHECKPOINTS_DIR, LAST_CHECKPOINT_LINK
from safetensors import SafetensorError

_PARTIAL = ".partial"


def write_checkpoint(out: Path, step: int, steps: int, write: Callable[[Path], None]) -> Path:
    """Let `write` fill the folder of the checkpoint at `step`, publish it and return its path.

    Raises `OSError` on a full disk, with nothing half-written left behind.
    """
    final = out / CHECKPOINTS_DIR / get_step_identifier(step, steps)
    partial = final.with_name(final.name + _PARTIAL)
    remove_partial(out)
    partial.mkdir(parents=True)
    try:
        write(partial)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial)
        if isinstance(error, SafetensorError) and "os error 28" in str(error):  # ENOSPC, said by Rust
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final)) from error
        raise
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    _point_last_to(final)
    return final


def last_checkpoint(out: Path) -> Path | None:
    """Return the newest complete checkpoint, or None.

    By name and not by the link: a kill may come between the renaming and the linking.
    """
    folder = out / CHECKPOINTS_DIR
    complete = [path for path in folder.glob("[0-9]*") if path.name.isdigit()] if folder.is_dir() else []
    return max(complete, key=lambda path: int(path.name), default=None)


def remove_partial(out: Path) -> None:
    """Delete what a killed process left unfinished."""
    for path in (out / CHECKPOINTS_DIR).glob(f"*{_PARTIAL}"):
        shutil.rmtree(path)


def _point_last_to(checkpoint: Path) -> None:
    link = checkpoint.with_name(LAST_CHECKPOINT_LINK)
    temporary = checkpoint.with_name(LAST_CHECKPOINT_LINK + ".tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.name)
    os.replace(temporary, link)

"""Decode a dataset once; then every batch is a gather from a memory-mapped file.

LeRobot decodes video for every sample it draws (about 7 ms of CPU per sample for two cameras), which a
two-core machine cannot afford, and images stored in parquet are slower still. The cache holds every
frame once, already resized to what the policy sees, as raw uint8 of shape (frames, height, width, 3)
per camera. It lives in ``DATASET/.cache/frames-<key>``; the key covers the dataset's metadata and files
and the resolution, so an edited dataset gets a new cache.

A cache is built in ``frames-<key>.partial`` and renamed when complete; a killed build continues where it
stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from lerobot.datasets.io_utils import load_nested_dataset
from lerobot.datasets.video_utils import decode_video_frames
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vla.atomic import write_text
from vla.errors import UserError
from vla.policy.images import resize_area
from vla.training.dataset import Demonstrations

_FORMAT = 1
_CHUNK = 64  # frames decoded at a time: 12 MB at 256x256
_BACKEND = "pyav"  # bundles its FFmpeg, so that a cache is the same on every machine
_TOLERANCE = 1e-3  # seconds between a frame and its timestamp; LeRobot's float32 is off by 2e-4 after an hour
_RESIDENT_LIMIT = 512 * 2**20


class FrameCache:
    """The frames of one dataset, memory-mapped read-only.

    Mapped pages count as the process's memory although the kernel can drop them at any time, so they are
    handed back after every 512 MB; they stay in the page cache and the next access costs microseconds.
    """

    def __init__(self, folder: Path):
        content = json.loads((folder / "frames.json").read_text())
        self._maps: dict[str, mmap.mmap] = {}
        self._frames: dict[str, np.ndarray] = {}
        self._touched = 0
        for key, shape in content["cameras"].items():
            with (folder / _file_name(key)).open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[key] = mapping
            self._frames[key] = np.frombuffer(mapping, np.uint8).reshape(shape)

    @property
    def cameras(self) -> tuple[str, ...]:
        """The camera keys."""
        return tuple(self._frames)

    def gather(self, frames: np.ndarray) -> dict[str, np.ndarray]:
        """Return a copy of the given frames per camera, each (len(frames), height, width, 3) uint8."""
        batch = {key: array[frames] for key, array in self._frames.items()}
        self._touched += sum(array.nbytes for array in batch.values())
        if self._touched > _RESIDENT_LIMIT:
            for mapping in self._maps.values():
                mapping.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return batch


class LiveFrames:
    """The frames of one dataset, decoded whenever they are drawn: for disks too small for a cache."""

    def __init__(self, dataset: Demonstrations, size: int):
        self._dataset, self._size = dataset, size
        self._rows = load_nested_dataset(dataset.root / "data") if dataset.meta.image_keys else None
        self._pool = ThreadPoolExecutor()  # decoders release the interpreter's lock

    def gather(self, frames: np.ndarray) -> dict[str, np.ndarray]:
        """Like `FrameCache.gather`."""
        return {camera.key: self._decode(camera.key, frames) for camera in self._dataset.interface.cameras}

    def _decode(self, key: str, frames: np.ndarray) -> np.ndarray:
        if self._dataset.info["features"][key]["dtype"] == "video":
            images = self._pool.map(lambda i: _decode_range(self._dataset, key, i, i + 1)[0], frames.tolist())
        else:
            cells = self._rows.data.column(key).take(frames).to_pylist()
            images = self._pool.map(lambda cell: _decode_image(self._dataset.root, cell), cells)
        return resize_area(torch.stack(list(images)), self._size).permute(0, 2, 3, 1).numpy()


def open_frame_cache(
    dataset: Demonstrations, size: int, *, folder: Path | None = None, quiet: bool = False
) -> FrameCache:
    """Open the frame cache of `dataset` with frames of `size` x `size`, building it first if need be.

    `folder` is where caches are kept (default: ``.cache`` in the dataset). Two processes that want the
    same cache build it once. Raises `UserError` when the disk is too small, the folder is not writable
    or a video is damaged.
    """
    folder = Path(folder) if folder else dataset.root / ".cache"
    final = folder / f"frames-{cache_key(dataset, size)}"
    if not (final / "frames.json").exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with final.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, even by a kill
                if not (final / "frames.json").exists():
                    _build(dataset, size, final, quiet)
        except PermissionError as error:
            raise UserError(
                f"The frame cache cannot be written ({error}); give a writable folder with --cache-dir."
            ) from None
    return FrameCache(final)


def cache_key(dataset: Demonstrations, size: int) -> str:
    """Name of the cache: a hash over its format, the frame size and the dataset."""
    return hashlib.sha256(json.dumps([_FORMAT, size, dataset.hash]).encode()).hexdigest()[:16]


def _build(dataset: Demonstrations, size: int, final: Path, quiet: bool) -> None:
    partial = final.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    shapes = {camera.key: (len(dataset), size, size, 3) for camera in dataset.interface.cameras}
    _require_space(partial, sum(int(np.prod(shape)) for shape in shapes.values()))
    stop = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=quiet) as progress, ThreadPoolExecutor(len(shapes)) as pool:
        bar = progress.add_task("decoding once into the frame cache", total=len(dataset) * len(shapes))
        jobs = [
            pool.submit(_write_camera, dataset, key, shape, partial, lambda n: progress.advance(bar, n), stop)
            for key, shape in shapes.items()
        ]
        try:
            for job in jobs:
                job.result()
        finally:
            stop.set()  # otherwise the pool would finish hours of decoding after Ctrl-C
    for key in shapes:
        _progress_file(partial, key).unlink()
    write_text(partial / "frames.json", json.dumps({"format": _FORMAT, "cameras": shapes}, indent=2))
    os.replace(partial, final)


def _write_camera(
    dataset: Demonstrations,
    key: str,
    shape: tuple[int, int, int, int],
    folder: Path,
    advance: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Decode one camera from where a previous build stopped."""
    path, progress = folder / _file_name(key), _progress_file(folder, key)
    done = int(progress.read_text()) if progress.exists() and path.exists() else 0
    advance(done)
    size = int(np.prod(shape[1:]))
    with path.open("r+b" if path.exists() else "w+b") as file:
        # Plain writes, not a mapping: on a full disk they fail with an error, a mapping with SIGBUS.
        file.seek(done * size)
        for frames in _decode(dataset, key, done):
            if stop.is_set():
                return
            resized = resize_area(frames, shape[1])
            file.write(resized.permute(0, 2, 3, 1).contiguous().numpy().data)
            file.flush()
            done += len(frames)
            write_text(progress, str(done))
            advance(len(frames))
        file.truncate()
    if done != shape[0]:
        raise UserError(f"Camera '{key}' of {dataset.root} has {done} of {shape[0]} frames; it is damaged.")


def _decode(dataset: Demonstrations, key: str, start: int) -> Iterator[torch.Tensor]:
    """Yield the frames from `start` in order, a few at a time, each (n, 3, height, width) uint8."""
    if dataset.info["features"][key]["dtype"] == "video":
        return _decode_video(dataset, key, start)
    return _decode_images(dataset, key, start)


def _decode_video(dataset: Demonstrations, key: str, start: int) -> Iterator[torch.Tensor]:
    while start < len(dataset):
        stop = min(start + _CHUNK, int(dataset.episode_end[start]))
        yield _decode_range(dataset, key, start, stop)
        start = stop


def _decode_range(dataset: Demonstrations, key: str, start: int, stop: int) -> torch.Tensor:
    """Frames of one episode (n, 3, H, W), by LeRobot's own function: those a `LeRobotDataset` returns."""
    episode = int(dataset.episode[start])
    path = dataset.root / dataset.meta.get_video_file_path(episode, key)
    offset = dataset.meta.episodes[episode][f"videos/{key}/from_timestamp"]
    timestamps = (offset + dataset.timestamp[start:stop]).tolist()
    try:
        return decode_video_frames(path, timestamps, _TOLERANCE, _BACKEND, return_uint8=True)
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"The video {path} cannot be decoded ({message}); copy it again.") from error


def _decode_images(dataset: Demonstrations, key: str, start: int) -> Iterator[torch.Tensor]:
    """Decode encoded images out of the parquet files (column-restricted, row group by row group)."""
    position = 0
    for path in sorted((dataset.root / "data").rglob("*.parquet")):
        file = parquet.ParquetFile(path)
        if position + file.metadata.num_rows <= start:
            position += file.metadata.num_rows
            continue
        for batch in file.iter_batches(_CHUNK, columns=[key]):
            cells = batch.column(0).to_pylist()[max(0, start - position) :]
            position += batch.num_rows
            if cells:
                yield torch.stack([_decode_image(dataset.root, cell) for cell in cells])


def _decode_image(root: Path, cell: Mapping[str, bytes | str | None]) -> torch.Tensor:
    source = io.BytesIO(cell["bytes"]) if cell["bytes"] else root / cell["path"]
    with Image.open(source) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _require_space(folder: Path, needed: int) -> None:
    written = sum(path.stat().st_size for path in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if needed - written > free:
        raise UserError(
            f"The frame cache needs {needed / 2**30:.1f} GB but {folder} has {free / 2**30:.1f} GB free; "
            "give another place with --cache-dir."
        )


def _file_name(key: str) -> str:
    return f"{key}.uint8"


def _progress_file(folder: Path, key: str) -> Path:
    return folder / f"{key}.progress"

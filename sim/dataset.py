"""Demonstrations into one LeRobotDataset v3: the step that runs once, when every demonstration exists.

LeRobot's own writer appends episode by episode, rewriting the growing video every time, and a kill
leaves it without its footer. Here each task's videos are joined once, without decoding, into as few files
as `LONGEST_VIDEO` allows, and the data is written in one pass; the metadata goes through LeRobot's own
classes. The order is that of the tasks and attempts, so the result does not depend on which worker recorded
what.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.compute_stats import compute_episode_stats, get_feature_stats
from lerobot.datasets.feature_utils import get_hf_features_from_features
from lerobot.datasets.io_utils import write_info, write_stats
from lerobot.datasets.video_utils import concatenate_video_files
from safetensors.numpy import load_file

from vla.contract import ACTION_KEY, IMAGE_PREFIX, STATE_KEY, Interface, Vector
from vla.sim.recording import ATTEMPT_FILE, FRAMES_FILE, PROVENANCE_FILE, SIMULATOR_FILE, VideoSettings
from vla.sim.worlds import World

SIMULATOR_PATH = "simulator/episode_{:06d}.safetensors"
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

#: Seconds. LeRobot looks frames up by their time in float32, within 0.1 ms: beyond 1024 s that is one step.
LONGEST_VIDEO = 900.0

#: LeRobot's default encoding on one thread per worker: 2 to 3 % of what drawing the frames costs.
ENCODER = RGBEncoderConfig()


def video_settings(fps: int) -> VideoSettings:
    """Return LeRobot's default encoding in the form a worker can use without LeRobot."""
    options = ENCODER.get_codec_options(encoder_threads=1, as_strings=True)
    return VideoSettings(ENCODER.vcodec, ENCODER.pix_fmt, options, fps)


def dataset_features(interface: Interface) -> dict[str, dict]:
    """Return LeRobot's feature table for `interface`; units and action space ride along as extra keys."""

    def vector(source: Vector, **extra: str) -> dict:
        shape, names = (source.dim,), list(source.names)
        return {"dtype": "float32", "shape": shape, "names": names, "units": list(source.units), **extra}

    features = {
        camera.key: {
            "dtype": "video",
            "shape": (camera.height, camera.width, 3),
            "names": ["height", "width", "channels"],
        }
        for camera in interface.cameras
    }
    features[STATE_KEY] = vector(interface.state)
    features[ACTION_KEY] = vector(interface.action, action_space=interface.action_space)
    return features


@dataclass(frozen=True)
class _Demonstration:
    """One success read back: `state` (T, S), `action` (T, D), `histograms` (3, 256) per camera."""

    folder: Path
    language: str
    state: np.ndarray
    action: np.ndarray
    histograms: dict[str, np.ndarray]

    @classmethod
    def load(cls, folder: Path) -> _Demonstration:
        tensors = load_file(folder / FRAMES_FILE)
        return cls(
            folder=folder,
            language=json.loads((folder / ATTEMPT_FILE).read_text())["language"],
            state=tensors.pop("state"),
            action=tensors.pop("action"),
            histograms={key.removeprefix("histogram."): value for key, value in tensors.items()},
        )

    @property
    def length(self) -> int:
        return len(self.action)


def assemble(
    tasks: Sequence[Sequence[Path]],
    world: World,
    image_size: int,
    provenance: Mapping,
    root: Path,
    name: str,
) -> None:
    """Write the demonstrations to a new LeRobotDataset v3 at `root`.

    `tasks` holds, per task, the folders of its demonstrations in their final order, recorded in `world` at
    `image_size`; `provenance` goes to ``meta/cogmerge.json``. The cost is linear in their number.
    """
    interface = world.interface(image_size)
    fps = int(interface.control_rate)
    features = dataset_features(interface)
    meta = LeRobotDatasetMetadata.create(name, fps, features, robot_type=world.robot, root=root)
    demonstrations = [[_Demonstration.load(folder) for folder in folders] for folders in tasks]
    with _DataWriter(meta) as writer:
        files = (part for task in demonstrations for part in _video_files(task, int(LONGEST_VIDEO * fps)))
        for file_index, part in enumerate(files):
            _join_videos(meta, part, file_index)
            for start, demonstration in zip(_starts(part), part, strict=True):
                _add_episode(meta, writer, demonstration, file_index, start)
    meta.finalize()
    meta.update_video_info(video_encoder=ENCODER)
    write_info(meta.info, root)
    write_stats(_total_stats(meta, [d for task in demonstrations for d in task]), root)
    (root / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n")


class _DataWriter:
    """The data parquet, one row group per episode, closed (and so valid) on exit."""

    def __init__(self, meta: LeRobotDatasetMetadata):
        path = meta.root / meta.data_path.format(chunk_index=0, file_index=0)
        path.parent.mkdir(parents=True)
        self._schema = get_hf_features_from_features(meta.features).arrow_schema
        self._writer = pq.ParquetWriter(path, self._schema, compression="snappy")

    def __enter__(self) -> _DataWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def write(self, columns: Mapping[str, np.ndarray]) -> None:
        rows = {key: columns[key].tolist() for key in self._schema.names}
        self._writer.write_table(pa.Table.from_pydict(rows, schema=self._schema))


def _video_files(task: Sequence[_Demonstration], most_frames: int) -> Iterator[list[_Demonstration]]:
    """Cut a task's demonstrations, in order, into runs of at most `most_frames` frames, or of one alone."""
    part: list[_Demonstration] = []
    for demonstration in task:
        if part and sum(d.length for d in part) + demonstration.length > most_frames:
            yield part
            part = []
        part.append(demonstration)
    if part:
        yield part


def _starts(part: Sequence[_Demonstration]) -> Iterator[int]:
    """Yield the frame at which each demonstration starts in its video file."""
    start = 0
    for demonstration in part:
        yield start
        start += demonstration.length


def _join_videos(meta: LeRobotDatasetMetadata, part: Sequence[_Demonstration], file_index: int) -> None:
    for key in meta.video_keys:
        parts = [d.folder / f"{key.removeprefix(IMAGE_PREFIX)}.mp4" for d in part]
        path = meta.root / meta.video_path.format(video_key=key, chunk_index=0, file_index=file_index)
        concatenate_video_files(parts, path)


def _add_episode(
    meta: LeRobotDatasetMetadata,
    writer: _DataWriter,
    demonstration: _Demonstration,
    file_index: int,
    start: int,
) -> None:
    """Append one episode to the data and to the metadata, and copy its simulator trajectory."""
    episode, length, first = meta.total_episodes, demonstration.length, meta.total_frames
    meta.save_episode_tasks([demonstration.language])
    frame = np.arange(length)
    columns = {
        STATE_KEY: demonstration.state,
        ACTION_KEY: demonstration.action,
        "timestamp": (frame / meta.fps).astype(np.float32),
        "frame_index": frame,
        "episode_index": np.full(length, episode),
        "index": frame + first,
        "task_index": np.full(length, meta.get_task_index(demonstration.language)),
    }
    writer.write(columns)
    stats = compute_episode_stats(columns, {key: meta.features[key] for key in columns})
    location: dict[str, object] = {"data/chunk_index": 0, "data/file_index": 0}
    location |= {"dataset_from_index": first, "dataset_to_index": first + length}
    for key in meta.video_keys:
        stats[key] = image_stats(demonstration.histograms[key.removeprefix(IMAGE_PREFIX)], frames=length)
        location |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": file_index}
        location[f"videos/{key}/from_timestamp"] = start / meta.fps
        location[f"videos/{key}/to_timestamp"] = (start + length) / meta.fps
    meta.save_episode(episode, length, [demonstration.language], stats, location)
    sidecar = meta.root / SIMULATOR_PATH.format(episode)
    sidecar.parent.mkdir(exist_ok=True)
    shutil.copyfile(demonstration.folder / SIMULATOR_FILE, sidecar)


def image_stats(histogram: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    """Return LeRobot's image statistics, (3, 1, 1) in [0, 1] per key, from a (3, 256) colour histogram."""
    values = np.arange(256) / 255.0
    weight = histogram / histogram.sum(axis=1, keepdims=True)
    mean = weight @ values
    cumulative = weight.cumsum(axis=1)
    stats = {
        "min": np.array([values[row.nonzero()[0][0]] for row in histogram]),
        "max": np.array([values[row.nonzero()[0][-1]] for row in histogram]),
        "mean": mean,
        "std": np.sqrt(np.maximum(weight @ values**2 - mean**2, 0.0)),
        **{key: values[(cumulative < q).sum(axis=1).clip(max=255)] for key, q in QUANTILES.items()},
    }
    return {key: value.reshape(3, 1, 1) for key, value in stats.items()} | {"count": np.array([frames])}


def _total_stats(meta: LeRobotDatasetMetadata, demonstrations: Sequence[_Demonstration]) -> dict[str, dict]:
    """Return the dataset's statistics over all frames; LeRobot 0.6 averages the episodes' quantiles."""
    stats = {key: meta.stats[key] for key in meta.features}  # LeRobot's order changes from run to run
    for key, attribute in ((STATE_KEY, "state"), (ACTION_KEY, "action")):
        rows = np.concatenate([getattr(d, attribute) for d in demonstrations])
        stats[key] = get_feature_stats(rows, axis=0, keepdims=False)
    for key in meta.video_keys:
        histogram = sum(d.histograms[key.removeprefix(IMAGE_PREFIX)] for d in demonstrations)
        stats[key] = image_stats(histogram, frames=meta.total_frames)
    return stats

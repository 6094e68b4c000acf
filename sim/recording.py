"""One demonstration on disk: what a collection worker writes, and how its images are drawn again.

A worker imports this module, so it needs no torch and no LeRobot. A demonstration is a folder

    attempt.json            success, steps, seeds; the only file of a failed attempt
    frames.safetensors      state (T, S) and action (T, D) float32, colour histograms per camera
    simulator.safetensors   simulator states (T, n) before every action, executed actions (T, D), float64
    <camera>.mp4            one video per camera

that appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vla.errors import UserError
from vla.sim.demonstrators.style import Style
from vla.sim.episode import Episode
from vla.sim.simulation import SimulationError
from vla.sim.worlds import Simulation, world_of

ATTEMPT_FILE = "attempt.json"
FRAMES_FILE = "frames.safetensors"
SIMULATOR_FILE = "simulator.safetensors"
#: Inside the finished dataset: how it came about.
PROVENANCE_FILE = "meta/cogmerge.json"


@dataclass(frozen=True)
class VideoSettings:
    """How videos are encoded; `options` are the codec's own."""

    codec: str
    pixel_format: str
    options: Mapping[str, str]
    fps: int


@dataclass
class Trace:
    """What a demonstrator did, one row per control step, each taken before the action is executed."""

    simulator: list[np.ndarray] = field(default_factory=list)
    state: list[np.ndarray] = field(default_factory=list)
    action: list[np.ndarray] = field(default_factory=list)
    executed: list[np.ndarray] = field(default_factory=list)

    def record(self, sim: Simulation, action: np.ndarray, executed: np.ndarray) -> None:
        """Append one step: `action` is the clean label, `executed` what noise made of it."""
        self.simulator.append(sim.sim_state())
        self.state.append(sim.state())
        self.action.append(np.array(action, np.float32))
        self.executed.append(np.array(executed, np.float64))  # replaying needs every digit


@dataclass(frozen=True)
class Recording:
    """The simulator's side of one demonstration: enough to draw every frame again at any size.

    `states` is (T, n), `executed` (T, D), both float64.
    """

    episode: Episode
    language: str
    image_size: int
    multisample: int
    versions: dict[str, str]
    states: np.ndarray
    executed: np.ndarray

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read a ``simulator.safetensors``; raise `UserError` if it is not one."""
        try:
            with safe_open(path, "np") as file:
                about = json.loads((file.metadata() or {})["recording"])
                return cls(
                    episode=Episode(**about.pop("episode")),
                    states=file.get_tensor("states"),
                    executed=file.get_tensor("executed"),
                    **about,
                )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a recorded simulator trajectory ({error}).") from error

    def save(self, path: Path) -> None:
        """Write the recording to `path`."""
        about = {key: value for key, value in asdict(self).items() if key not in ("states", "executed")}
        tensors = {"states": self.states, "executed": self.executed}
        path.write_bytes(save(tensors, metadata={"recording": json.dumps(about, sort_keys=True)}))


def render(recording: Recording, sim: Simulation) -> Iterator[dict[str, np.ndarray]]:
    """Draw every frame of `recording` in `sim`: camera name to (H, W, 3) uint8, in order.

    `sim` must hold the recording's task; its image size is free. At the recorded size the frames are
    identical to those that `sim.images()` would have returned during the demonstration.
    """
    for state in recording.states:
        sim.set_sim_state(state)
        yield sim.images()


def record_attempt(
    sim: Simulation, episode: Episode, style: Style, folder: Path, video: VideoSettings
) -> bool:
    """Run one demonstration and write it to `folder`, atomically; return whether it succeeded.

    Frames are drawn after the demonstration has succeeded, from its simulator states: drawing is nine
    tenths of the cost, and a failed attempt pays none of it.
    """
    trace = Trace()
    success, steps, outcome = _demonstrate(sim, episode, style, trace)
    about = {
        "episode": asdict(episode),
        "language": sim.language,
        "success": success,
        "steps": steps,
        "outcome": outcome,
    }
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        if success:
            _write_success(trace, sim, episode, temporary, video)
        (temporary / ATTEMPT_FILE).write_text(json.dumps(about, indent=2) + "\n")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after an error, such as a full disk
    return success


def _demonstrate(sim: Simulation, episode: Episode, style: Style, trace: Trace) -> tuple[bool, int, str]:
    """Return success, steps and outcome in words; unstable physics is a failed attempt like any other."""
    try:
        done = world_of(episode.suite).demonstrate(
            sim, episode, seed=episode.seed, style=style, record=trace.record
        )
    except SimulationError as error:
        return False, len(trace.action), str(error)
    return done.success, done.steps, done.reason


def _write_success(
    trace: Trace, sim: Simulation, episode: Episode, folder: Path, video: VideoSettings
) -> None:
    recording = Recording(
        episode=episode,
        language=sim.language,
        image_size=sim.image_size,
        multisample=sim.multisample,
        versions=world_of(episode.suite).versions(),
        states=np.stack(trace.simulator),
        executed=np.stack(trace.executed),
    )
    recording.save(folder / SIMULATOR_FILE)
    histograms = _encode(render(recording, sim), folder, video)
    tensors = {"state": np.stack(trace.state), "action": np.stack(trace.action)}
    tensors |= {f"histogram.{name}": histogram for name, histogram in histograms.items()}
    (folder / FRAMES_FILE).write_bytes(save(tensors))


def _encode(
    frames: Iterator[dict[str, np.ndarray]], folder: Path, settings: VideoSettings
) -> dict[str, np.ndarray]:
    """Encode one video per camera and return each camera's colour histogram, (3, 256) int64.

    A histogram of 8-bit values holds the exact mean, deviation and quantiles of every pixel.
    """
    import av

    containers: dict[str, av.container.OutputContainer] = {}
    histograms: dict[str, np.ndarray] = {}
    try:
        for images in frames:
            for name, image in images.items():
                if name not in containers:
                    containers[name] = _open_video(folder / f"{name}.mp4", image.shape, settings)
                    histograms[name] = np.zeros((3, 256), np.int64)
                container = containers[name]
                container.mux(container.streams.video[0].encode(av.VideoFrame.from_ndarray(image, "rgb24")))
                _leave_real_time()
                histograms[name] += [np.bincount(image[..., c].ravel(), minlength=256) for c in range(3)]
        for container in containers.values():
            container.mux(container.streams.video[0].encode())  # flush what the encoder holds back
    finally:
        for container in containers.values():
            container.close()
    return histograms


def _leave_real_time() -> None:
    """Undo what SVT-AV1 does as root: the calling thread becomes SCHED_FIFO 99 and starves the machine."""
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) == os.SCHED_FIFO:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _open_video(path: Path, shape: tuple[int, ...], settings: VideoSettings):
    import av

    container = av.open(str(path), "w")
    stream = container.add_stream(settings.codec, Fraction(settings.fps), options=dict(settings.options))
    stream.pix_fmt = settings.pixel_format
    stream.height, stream.width = shape[:2]
    return container

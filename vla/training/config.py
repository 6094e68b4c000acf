"""`TrainConfig` and what `--resume` and `--overwrite` mean for it."""

from __future__ import annotations

import json
import shutil
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from vla.atomic import write_text
from vla.errors import UserError
from vla.json_file import load_json
from vla.training.augmentation import AugmentationConfig
from vla.training.lora import LoraSettings

RECORD_FILE = "train.json"
#: Fields that may differ between a run and its continuation: they do not change what is learned until
#: the step at which the run stopped.
_FREE_ON_RESUME = frozenset(
    {"resume", "overwrite", "steps", "max_minutes", "checkpoint_every", "log_every", "eval_every"}
    | {"num_threads", "logger", "cache_dir", "frame_cache", "out", "gradient_checkpointing"}
)


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, for how long. Defaults are the recipe of the nano preset."""

    out: Path
    """Folder of the run: checkpoints/, metrics.jsonl, curves.png, train.json."""
    dataset: tuple[Path, ...] = ()
    """One or several folders with a LeRobotDataset v3. Not needed with --resume."""
    dataset_weights: tuple[float, ...] = ()
    """Share of every dataset in the training samples; by default every frame counts the same."""
    tasks: tuple[str, ...] = ()
    """Train on these tasks of the datasets only, all by default: instructions word for word, or globs such as
    "put the bowl*"."""
    without_tasks: tuple[str, ...] = ()
    """Leave out these tasks, named alike."""
    action_space: str | None = None
    """What the actions mean, for datasets that do not say: osc_pose_delta or joint_position."""
    control_rate: float | None = None
    """Control rate in Hz, if the dataset's fps is not it."""
    preset: str = "nano"
    """Size of the policy."""
    policy: tuple[str, ...] = ()
    """Fields of the policy's configuration that differ from the preset: chunk_size=16 hidden_size=192."""
    init_from: Path | None = None
    """Checkpoint whose weights, sizes and normalisation to start from; its contract must fit the dataset."""
    expert: str | None = None
    """Train an expert of this name: LoRA factors on the frozen --base, saved in PEFT's format without it."""
    base: Path | None = None
    """Checkpoint that the expert is trained on."""
    statistics: Literal["base", "own"] = "base"
    """Normalisation of an expert: the base's, so that it starts as the base and experts share one scale; or
    its own dataset's, for states and actions far from what the base was trained on."""
    head_seed: int | None = None
    """Start an expert's head anew from this seed, as MergeVLA does, instead of as the base's."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Low-rank factors instead of all weights; --lora.rank alone adapts --init-from and saves it folded."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, sample for sample."""
    overwrite: bool = False
    """Delete the run in --out first."""
    steps: int = 8000
    """Optimizer steps."""
    max_minutes: float | None = None
    """Stop early at a step boundary; the learning rate still follows --steps."""
    schedule_steps: int | None = None
    """Length of the learning rate schedule if it is not --steps."""
    batch_size: int = 64
    """Samples per step and process."""
    lr: float | None = None
    """Peak learning rate; by default the policy's, and three times that for factors on nano."""
    grad_clip: float | None = None
    """Largest norm of the gradient; by default the policy's."""
    ema_decay: float = 0.999
    """Decay of the average of the weights that is evaluated and saved; 0 saves the raw weights."""
    augment: bool = True
    """Random shift and colour jitter of the training images."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    held_out: float = 0.04
    """Fraction of every task's episodes kept out of training for the held-out loss."""
    held_out_samples: int = 512
    """Frames of those episodes on which it is computed."""
    seed: int = 0
    """Every random choice follows from it."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of the forward pass; auto measures both once."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always has one."""
    log_every: int = 50
    """Steps between rows of metrics.jsonl."""
    eval_every: int = 500
    """Steps between held-out losses."""
    num_threads: int | None = None
    """Threads of torch; by default torch's own choice."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    device: str | None = None
    """cpu or cuda; by default a GPU where there is one."""
    cache_dir: Path | None = None
    """Where frame caches are kept; by default in the dataset's folder .cache."""
    frame_cache: bool = True
    """Without it, every frame is decoded whenever it is drawn: slow, but needs no disk."""
    logger: Literal["none", "trackio", "wandb"] = "none"
    """Experiment tracker beside metrics.jsonl."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "log_every", "eval_every"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1."
                )
        for name in ("lr", "grad_clip", "max_minutes", "control_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be positive.")
        for name in ("ema_decay", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must lie in [0, 1)."
                )
        if self.dataset_weights and len(self.dataset_weights) != len(self.dataset):
            raise UserError(
                f"--dataset-weights has {len(self.dataset_weights)} entries for {len(self.dataset)} datasets."
            )
        if any(weight <= 0 for weight in self.dataset_weights):
            raise UserError("Every entry of --dataset-weights must be positive; leave a dataset out instead.")
        self._check_adapter()

    def _check_adapter(self) -> None:
        if (self.expert is None) != (self.base is None):
            raise UserError("An expert needs both --expert NAME and --base CHECKPOINT.")
        if self.expert is not None and (self.init_from is not None or self.policy):
            raise UserError("An expert has its base's weights and sizes; leave out --init-from and --policy.")
        if self.expert is None and (self.statistics == "own" or self.head_seed is not None):
            raise UserError("--statistics own and --head-seed are for experts: give --expert and --base too.")
        if self.expert is None and self.lora.rank is None and self.lora != LoraSettings():
            raise UserError("The --lora options need --lora.rank (or --expert NAME).")

    @property
    def uses_lora(self) -> bool:
        """Whether low-rank factors are trained instead of all weights."""
        return self.expert is not None or self.lora.rank is not None

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as JSON-ready data."""
        return json.loads(json.dumps(asdict(self), default=str))

    def recipe(self) -> dict[str, Any]:
        """Return what a checkpoint records of it: everything but the places on this machine."""
        places = ("out", "dataset", "init_from", "base", "cache_dir", "resume", "overwrite")
        return {name: value for name, value in self.to_json().items() if name not in places}


def open_run(config: TrainConfig, processes: int = 1) -> tuple[TrainConfig, dict[str, Any] | None]:
    """Look at the folder of the run and settle what is trained; nothing is written or deleted yet.

    Returns the configuration to use and, with ``resume``, the record of the run. A field left at its
    default continues as recorded; `processes` share the samples of a step, however many they were before.
    Raises `UserError` when the folder holds something else, or when options contradict the run that is
    resumed.
    """
    if config.resume and config.overwrite:
        raise UserError("--resume continues the run in --out and --overwrite deletes it; choose one.")
    if config.resume:
        record = _read_record(config.out)
        return _continue(config, record, processes), record
    if not config.dataset:
        raise UserError("Nothing to train on: give a dataset with --dataset DIR (`vla collect` makes one).")
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        if not config.overwrite:
            raise UserError(f"{config.out} exists; continue it with --resume or replace it with --overwrite.")
        if not (config.out / RECORD_FILE).exists():
            raise UserError(f"{config.out} is not a training run, so --overwrite does not delete it.")
    return config, None


def write_record(config: TrainConfig, record: dict[str, Any]) -> None:
    """Write ``train.json``; for a new run, after emptying the folder that `open_run` let pass."""
    if not config.resume and config.out.exists():
        shutil.rmtree(config.out)
    config.out.mkdir(parents=True, exist_ok=True)
    content = record | {"config": config.to_json()}
    write_text(config.out / RECORD_FILE, json.dumps(content, indent=2) + "\n")


def _read_record(out: Path) -> dict[str, Any]:
    absent = f"There is no training run in {out} to resume (no {RECORD_FILE})."
    return load_json(out / RECORD_FILE, absent=absent, remedy="the run cannot be resumed")


def _continue(config: TrainConfig, record: dict[str, Any], processes: int) -> TrainConfig:
    try:
        recorded, samples = _from_json(record["config"]), record["samples_per_step"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{config.out / RECORD_FILE} was not written by this release ({error!r}), so the run cannot be"
            " resumed; start a new one with --init-from."
        ) from None
    size, rest = divmod(samples, processes)
    if rest:
        raise UserError(
            f"The run in {config.out} takes {samples} samples per step, which {processes} processes cannot"
            " share evenly; resume it with a number of processes that divides them."
        )
    recorded = replace(recorded, batch_size=size)
    merged = {}
    for entry in fields(TrainConfig):
        default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
        given, before = getattr(config, entry.name), getattr(recorded, entry.name)
        if entry.name not in _FREE_ON_RESUME and given != default and given != before:
            option = f"--{entry.name.replace('_', '-')}"
            raise UserError(
                f"The run in {config.out} was started with {option} {before}, not {given}; "
                "leave the option out to resume it, or start a new run."
            )
        merged[entry.name] = before if given == default else given
    # Raising --steps must not stretch a schedule that has already been followed.
    schedule = recorded.schedule_steps or recorded.steps
    return replace(recorded, **merged | {"resume": True, "schedule_steps": schedule})


def _from_json(content: dict[str, Any]) -> TrainConfig:
    content = {"tasks": (), "without_tasks": ()} | content  # absent from runs of earlier releases
    for name in ("out", "init_from", "base", "cache_dir"):
        content[name] = content[name] and Path(content[name])
    content["dataset"] = tuple(map(Path, content["dataset"]))
    for name in ("dataset_weights", "policy", "tasks", "without_tasks"):
        content[name] = tuple(content[name])
    content["augmentation"] = AugmentationConfig(**content["augmentation"])
    lora = content["lora"]
    content["lora"] = LoraSettings(**lora | {name: tuple(lora[name]) for name in ("targets", "full")})
    return TrainConfig(**content)

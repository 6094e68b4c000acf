"""`vla train`: a thin loop on accelerate, for one process on CPU or GPU and for `accelerate launch`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast_object_list
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vla.errors import UserError
from vla.training.allocator import keep_freed_memory
from vla.training.batches import BatchSource
from vla.training.checkpoints import last_checkpoint, remove_partial
from vla.training.config import TrainConfig, open_run, write_record
from vla.training.curves import CURVES_FILE, draw_curves
from vla.training.dataset import Demonstrations, open_demonstrations, require_same_interface
from vla.training.frame_cache import FrameCache, LiveFrames, open_frame_cache
from vla.training.interruption import Interruption
from vla.training.metrics import MetricsLog, Window
from vla.training.policy_setup import start_policy
from vla.training.precision import BF16, time_precisions
from vla.training.recompute import recompute_activations
from vla.training.task_choice import choose_tasks
from vla.training.trainer import Batch, Trainer

__all__ = ["TrainConfig", "train"]

_console = Console(stderr=True)


def train(config: TrainConfig) -> None:
    """Train a policy as `config` says.

    Writes ``checkpoints/`` in LeRobot's layout, ``metrics.jsonl``, ``curves.png`` and ``train.json`` into
    ``config.out``. Raises `UserError` for bad input and `KeyboardInterrupt` after SIGINT or SIGTERM, once
    the checkpoint of the current step is written.
    """
    keep_freed_memory()
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    accelerator = _accelerator(config)
    config, record = _on_main_first(accelerator, lambda: open_run(config, accelerator.num_processes))
    trainer, metrics = _set_up(config, record, accelerator)
    with Interruption() as interruption:
        try:
            interrupted = _run(trainer, metrics, interruption)
        finally:
            metrics.close()
    if interrupted:
        raise KeyboardInterrupt
    accelerator.end_training()


def _accelerator(config: TrainConfig) -> Accelerator:
    accelerator = Accelerator(
        cpu=config.device == "cpu" or not torch.cuda.is_available(),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.distributed_type is DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError(
            "Training is sharded with FSDP2: set fsdp_version: 2 in the accelerate configuration."
        )
    return accelerator


def _on_main_first(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """Run `function` on the main process and hand its result, or its error, to all processes."""
    result: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            result = [function()]
        except (UserError, OSError) as error:
            result = [error]
    if accelerator.num_processes > 1:
        broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def _set_up(config: TrainConfig, record: dict | None, accelerator: Accelerator) -> tuple[Trainer, MetricsLog]:
    datasets = [
        open_demonstrations(root, action_space=config.action_space, control_rate=config.control_rate)
        for root in config.dataset
    ]
    require_same_interface(datasets)
    datasets = choose_tasks(datasets, config.tasks, config.without_tasks)
    if record is not None:
        _require_same_data(record, datasets)
    checkpoint = last_checkpoint(config.out) if record is not None else None
    start = start_policy(config, datasets, accelerator.device.type, resume_from=checkpoint)
    if config.gradient_checkpointing:
        recompute_activations(start.policy)
    source = BatchSource(
        datasets,
        _frames(config, datasets, start.policy.config.image_size, accelerator),
        start.policy.config.action_delta_indices,
    )
    trainer = Trainer(config, datasets, source, start, accelerator)
    _require_shardable(trainer)
    precision, seconds = _choose_precision(trainer) if record is None else (None, None)
    record = _on_main_first(accelerator, lambda: _keep_record(trainer, record, precision, seconds))
    trainer.precision = record["precision"]
    if trainer.precision == BF16 and start.card is not None and not trainer.sharded:
        start.adapter.round_frozen(trainer.policy, torch.bfloat16)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    metrics = MetricsLog(
        config.out,
        trainer.step,
        tracker=config.logger,
        run_id=record["run_id"],
        config=config.to_json(),
        enabled=accelerator.is_main_process,
    )
    if accelerator.is_main_process:
        remove_partial(config.out)
        _introduce(trainer)
    return trainer, metrics


def _require_shardable(trainer: Trainer) -> None:
    pruner = trainer.policy.config.token_pruner
    if trainer.sharded and pruner in ("pyramid_drop", "feather"):
        raise UserError(
            f"policy.token_pruner={pruner} reads an attention layer's weights outside of it, where FSDP has"
            " not gathered them; train it without FSDP."
        )


def _frames(
    config: TrainConfig, datasets: list[Demonstrations], size: int, accelerator: Accelerator
) -> list[FrameCache] | list[LiveFrames]:
    if not config.frame_cache:
        return [LiveFrames(dataset, size) for dataset in datasets]
    folder = config.cache_dir

    def build() -> None:
        for dataset in datasets:
            open_frame_cache(dataset, size, folder=folder)

    _on_main_first(accelerator, build)
    return [open_frame_cache(dataset, size, folder=folder, quiet=True) for dataset in datasets]


def _keep_record(
    trainer: Trainer, record: dict[str, Any] | None, precision: str | None, seconds: dict[str, float] | None
) -> dict[str, Any]:
    """Write what is decided once per run to ``train.json``, with the configuration."""
    if record is None:
        record = {
            "precision": precision,
            "precision_seconds": seconds,
            "dataset_hash": [dataset.hash for dataset in trainer.datasets],
            "samples_per_step": trainer.samples_per_step,
            "run_id": uuid.uuid4().hex,
        }
    write_record(trainer.config, record)
    return record


def _choose_precision(trainer: Trainer) -> tuple[str, dict[str, float] | None]:
    """Every process takes part, as in a training step; what the main one measures decides."""
    if trainer.config.precision != "auto":
        return trainer.config.precision, None
    batch = trainer.preprocess(trainer.batch(0))
    seconds = time_precisions(lambda: trainer.model(batch)[0], trainer.model, trainer.accelerator.device)
    return min(seconds, key=seconds.get), seconds


def _require_same_data(record: dict[str, Any], datasets: list[Demonstrations]) -> None:
    for dataset, before in zip(datasets, record["dataset_hash"], strict=True):
        if dataset.hash != before:
            raise UserError(
                f"The dataset at {dataset.root} has changed since the run began, which cannot be resumed "
                "sample for sample; start a new one with --init-from."
            )


def _introduce(trainer: Trainer) -> None:
    trained = sum(p.numel() for p in trainer.policy.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in trainer.policy.parameters())
    part = f" ({trained / 1e6:.2f} M of them trained)" if trained < parameters else ""
    tasks = len({text for dataset in trainer.datasets for text in dataset.chosen_instructions})
    frames = sum(len(dataset.chosen_frames) for dataset in trainer.datasets)
    _console.print(
        f"{parameters / 1e6:.2f} M parameters{part}, {frames} frames of {tasks} tasks, "
        f"{trainer.samples_per_step} samples per step, {trainer.precision}, "
        f"{torch.get_num_threads()} threads, from step {trainer.step}",
        highlight=False,
    )


def _run(trainer: Trainer, metrics: MetricsLog, interruption: Interruption) -> bool:
    """Train to the last step, the time limit or a signal; return whether it was a signal."""
    config, main = trainer.config, trainer.accelerator.is_main_process
    deadline = time.monotonic() + 60 * (config.max_minutes or float("inf"))
    window, interrupted = Window(trainer.samples_per_step), False
    with _progress(trainer) as show:
        for batch in _batches(trainer):
            data_seconds = window.lap()
            values = trainer.update(trainer.preprocess(batch))
            window.add(values | {"data_seconds": data_seconds, "update_seconds": window.lap()})
            timeout, interrupted = _agree(trainer, time.monotonic() > deadline, interruption.requested)
            last = timeout or interrupted or trainer.step == config.steps
            if last or trainer.step % config.log_every == 0:
                row = _mean(trainer, window.close())
                metrics.write("train", trainer.step, **row)
                show(row)
            if trainer.has_held_out and not interrupted and (last or trainer.step % config.eval_every == 0):
                metrics.write("held_out", trainer.step, **trainer.held_out_loss())
            if last or trainer.step % config.checkpoint_every == 0:
                trainer.save()
                if main:
                    draw_curves(config.out)
            window.lap()  # neither evaluation nor saving counts as training time
            if last:
                break
    if main:
        _conclude(trainer, metrics)
    return interrupted


def _agree(trainer: Trainer, timeout: bool, interrupted: bool) -> tuple[bool, bool]:
    """Whether any process saw either: all must stop at the same step."""
    flags = trainer.sum({"timeout": float(timeout), "interrupted": float(interrupted)})
    return flags["timeout"] > 0, flags["interrupted"] > 0


def _mean(trainer: Trainer, row: dict[str, float]) -> dict[str, float]:
    processes = trainer.accelerator.num_processes
    return {name: total / processes for name, total in trainer.sum(row).items()}


def _batches(trainer: Trainer) -> Iterator[Batch]:
    """The batches of the remaining steps; assembled one ahead in a thread when the model is on a GPU.

    On a CPU a thread would only compete for the cores of the forward pass.
    """
    steps = range(trainer.step, trainer.config.steps)
    if trainer.accelerator.device.type == "cpu":
        yield from map(trainer.batch, steps)
        return
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(trainer.batch, trainer.step)
        for step in steps:
            batch = ahead.result()
            ahead = pool.submit(trainer.batch, step + 1)
            yield batch


@contextmanager
def _progress(trainer: Trainer) -> Iterator[Callable[[dict[str, float]], None]]:
    """A progress bar that shows loss, samples per second and the time to go."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} samples/s"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=_console, disable=not trainer.accelerator.is_main_process) as progress:
        bar = progress.add_task(
            "", total=trainer.config.steps, completed=trainer.step, loss=float("nan"), rate=0.0
        )
        yield lambda row: progress.update(
            bar, completed=trainer.step, loss=row["loss"], rate=row["samples_per_second"]
        )


def _conclude(trainer: Trainer, metrics: MetricsLog) -> None:
    out = trainer.config.out
    _console.print(
        f"step {trainer.step}: checkpoint {last_checkpoint(out)}, metrics {metrics.path}, "
        f"curves {out / CURVES_FILE}",
        highlight=False,
        soft_wrap=True,
    )

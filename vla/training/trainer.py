"""One run of training: everything that one step, one held-out loss and one checkpoint need.

Every random choice of step `s` follows from ``(seed, s, rank)``: the sample order, the augmentation and
torch's own generator are set anew for each step. A resumed run is therefore the same run, bit for bit,
without random states to carry along.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from vla.errors import UserError
from vla.training.batches import KEYFRAME_KEY, BatchSource
from vla.training.checkpoints import write_checkpoint
from vla.training.config import TrainConfig
from vla.training.dataset import Demonstrations
from vla.training.ema import WeightAverage
from vla.training.full_state import is_sharded
from vla.training.policy_setup import Start
from vla.training.precision import FLOAT32, autocast
from vla.training.run_state import gathered_state, restore_state, write_state
from vla.training.sampler import EpochSampler, held_out_episodes

#: Low-rank factors learn slower at the rate of all weights, because B starts at zero. Measured on nano, from
#: libero_object to libero_goal, held-out loss after 150 steps of 32: all weights at 1e-3 0.318, an expert at
#: 1e-3 0.361 and at 3e-3 0.328. Presets around pretrained backbones name a rate for factors to begin with.
LORA_RATE = 3.0
NAN_DUMP_FILE = "nan_batch.safetensors"

Batch = dict[str, Any]


class Trainer:
    """The state of a run and the verbs on it: `batch`, `update`, `held_out_loss`, `save`, `restore`."""

    def __init__(
        self,
        config: TrainConfig,
        datasets: Sequence[Demonstrations],
        source: BatchSource,
        start: Start,
        accelerator: Accelerator,
        precision: str = FLOAT32,
    ):
        self.config, self.datasets, self.source = config, datasets, source
        self.start, self.policy, self.accelerator = start, start.policy, accelerator
        self.precision = precision
        self.step = 0
        train, self._held_out = split_frames(config, datasets)
        self.sampler = EpochSampler(train, config.seed, config.dataset_weights or None)
        optimizer, self.scheduler, self.grad_clip = _optimization(config, self.policy)
        self.model, self.optimizer = accelerator.prepare(self.policy, optimizer)
        self.sharded = is_sharded(self.model)
        self.ema = WeightAverage(self.policy, config.ema_decay) if config.ema_decay else None

    @property
    def samples_per_step(self) -> int:
        """Samples per step over all processes."""
        return self.config.batch_size * self.accelerator.num_processes

    @property
    def has_held_out(self) -> bool:
        """Whether any episode is held out."""
        return len(self._held_out) >= self.accelerator.num_processes  # else a process would have no share

    def batch(self, step: int) -> Batch:
        """Assemble this process's part of the batch of `step`; a pure function of it."""
        rank, size = self.accelerator.process_index, self.config.batch_size
        frames = self.sampler.take(step * self.samples_per_step + rank * size, size)
        generator = torch.Generator().manual_seed(_seed(self.config.seed, step, rank, 1))
        return self.source.batch(frames, self.config.augmentation if self.config.augment else None, generator)

    def preprocess(self, batch: Batch) -> Batch:
        """Run the policy's preprocessor, which knows nothing of the keyframe target."""
        targets = {key: value for key, value in batch.items() if key.startswith(KEYFRAME_KEY)}
        if targets and targets[KEYFRAME_KEY].shape[-1] != self.policy.config.keyframe_dim:
            targets = {}  # a checkpoint from elsewhere, whose head was made for another target
        device = self.accelerator.device
        inputs = self.start.loaded.preprocessor(batch)
        return inputs | {key: value.to(device) for key, value in targets.items()}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Forward pass of a preprocessed batch: the loss and its parts."""
        with autocast(self.precision, self.accelerator.device):
            return self.model(batch)

    def update(self, batch: Batch) -> dict[str, float]:
        """Take one optimizer step on a preprocessed batch; return the loss, its parts, gradient norm, lr.

        Raises `UserError` when the loss is not finite, before it can reach the weights.
        """
        self.model.train()
        torch.manual_seed(_seed(self.config.seed, self.step, self.accelerator.process_index, 2))
        loss, parts = self.loss(batch)
        value = loss.item()
        if not np.isfinite(value):
            self._stop_on_nan(batch, value)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.grad_clip).item()
        if not np.isfinite(norm):
            self._stop_on_nan(batch, norm)
        lr = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update()
        self.step += 1
        return {"loss": value, **parts, "grad_norm": norm, "lr": lr}

    @torch.no_grad()
    def held_out_loss(self) -> dict[str, float]:
        """Mean loss and parts over fixed frames of held-out episodes, without augmentation.

        Of the averaged weights, the ones that are saved. Every process takes its share of the frames.
        """
        # DDP would synchronise buffers on every call; shards can only be put together by the wrapper.
        model = (self.model if self.sharded else self.policy).eval()
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        largest_share = -(-len(self._held_out) // processes)
        batches = -(-largest_share // self.config.batch_size)  # the same number everywhere: shards need it
        total: dict[str, float] = {}
        with self.ema.applied() if self.ema is not None else nullcontext():
            for frames in np.array_split(self._held_out[rank::processes], batches):
                given = frames if len(frames) else self._held_out[:1]
                with autocast(self.precision, self.accelerator.device):
                    loss, parts = model(self.preprocess(self.source.batch(given)))
                for name, value in {"loss": loss.item(), **parts}.items():
                    total[name] = total.get(name, 0.0) + value * len(frames)
        return {name: value / len(self._held_out) for name, value in self.sum(total).items()}

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Add up `values` over all processes; every process must call this at the same step."""
        if self.accelerator.num_processes == 1:
            return values
        stacked = torch.tensor(list(values.values()), device=self.accelerator.device)
        return dict(zip(values, self.accelerator.reduce(stacked, "sum").tolist(), strict=True))

    def save(self) -> Path | None:
        """Write the checkpoint of the current step (main process only) and return its path."""
        path = None
        with gathered_state(self) as state:
            if state is not None:
                path = write_checkpoint(
                    self.config.out,
                    self.step,
                    self.config.steps,
                    lambda folder: write_state(self, state, folder),
                )
        self.accelerator.wait_for_everyone()
        return path

    def restore(self, checkpoint: Path) -> None:
        """Continue from `checkpoint`: weights, average, optimizer, schedule and step."""
        restore_state(self, checkpoint)

    def _stop_on_nan(self, batch: Batch, value: float) -> None:
        path = self.config.out / NAN_DUMP_FILE
        tensors = {key: item.contiguous() for key, item in batch.items() if isinstance(item, Tensor)}
        save_file(tensors, path, metadata={"step": str(self.step), "value": str(value)})
        raise UserError(
            f"The loss or its gradient became {value} at step {self.step} (batch in {path}); lower --lr, use "
            "--precision float32 or look for outliers in the dataset's actions and states."
        )


def split_frames(
    config: TrainConfig, datasets: Sequence[Demonstrations]
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Split the frames of the chosen tasks, numbered across datasets, by episode.

    An episode is held out whatever other tasks are chosen beside its own.

    Returns the training frames per dataset and the frames of the held-out loss: ``held_out_samples`` drawn
    once from the held-out episodes, sorted.
    """
    train, held_out, first = [], [], 0
    for dataset in datasets:
        chosen = dataset.chosen_frames
        episode = dataset.episode[chosen]
        kept_out = np.isin(
            episode, held_out_episodes(episode, dataset.task[chosen], config.held_out, config.seed)
        )
        train.append(first + chosen[~kept_out])
        held_out.append(first + chosen[kept_out])
        first += len(dataset)
    frames = np.concatenate(held_out)
    if len(frames) > config.held_out_samples:
        generator = np.random.default_rng(config.seed)
        frames = np.sort(generator.choice(frames, config.held_out_samples, replace=False))
    return tuple(train), frames


def _optimization(config: TrainConfig, policy) -> tuple[torch.optim.Optimizer, Any, float]:
    """AdamW and cosine schedule as `lerobot-train` builds them, the schedule spanning all our steps."""
    preset = policy.config.get_optimizer_preset()
    from_scratch = not (policy.config.decoder_config or policy.config.vision_configs)
    lr = config.lr or preset.lr * (LORA_RATE if config.uses_lora and from_scratch else 1.0)
    optimizer = torch.optim.AdamW(
        policy.get_optim_params(),
        lr=lr,
        betas=preset.betas,
        eps=preset.eps,
        weight_decay=preset.weight_decay,
        fused=True,
    )
    steps = config.schedule_steps or config.steps
    schedule = policy.config.get_scheduler_preset()
    schedule = dataclasses.replace(
        schedule,
        peak_lr=lr,
        decay_lr=schedule.decay_lr * lr / preset.lr,
        num_decay_steps=max(schedule.num_decay_steps, steps),
    )
    clip = config.grad_clip if config.grad_clip is not None else preset.grad_clip_norm
    return optimizer, schedule.build(optimizer, steps), clip


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, dtype=np.uint64)[0] >> 1)

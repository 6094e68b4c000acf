"""What a checkpoint of a run holds: what is shipped, and what is needed to go on.

``pretrained_model/`` is a policy's checkpoint or an expert's folder, with the averaged weights.
``training_state/`` is LeRobot's (optimizer, schedule, step) plus the trained parameters as they are and, for
low-rank factors, which ``pretrained_model/`` has in another form, their average. Everything is whole and
named by parameter, so that it does not depend on the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lerobot.common.train_utils import load_training_state, save_training_state
from lerobot.optim import load_optimizer_state_dict
from lerobot.utils.constants import PRETRAINED_MODEL_DIR, TRAINING_STATE_DIR
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vla.errors import UserError
from vla.experts.lora_expert import LoraExpert
from vla.policy.checkpoint import WEIGHTS_FILE, checkpoint_hash, save_checkpoint
from vla.policy.manifest import describe_build, save_manifest
from vla.training.full_state import gather_optimizer, gather_weights, load_optimizer, load_weights

if TYPE_CHECKING:
    from vla.training.trainer import Trainer

RAW_WEIGHTS_FILE = "raw_model.safetensors"
AVERAGED_WEIGHTS_FILE = "averaged_model.safetensors"


@dataclass(frozen=True)
class RunState:
    """Whole tensors on the CPU: the trained parameters, what is shipped, and the optimizer's state.

    An expert ships its trained parameters only, any other run all weights.
    """

    raw: dict[str, Tensor]
    shipped: dict[str, Tensor]
    optimizer: dict[str, Any]


@contextmanager
def gathered_state(trainer: Trainer) -> Iterator[RunState | None]:
    """Yield the state of `trainer` on the main process, None elsewhere. Every process must enter this.

    Frozen weights of an expert's base are neither gathered nor copied, and what is shipped are the live
    tensors, which hold the average as long as the context lasts: of a large policy a copy may not fit.
    """
    main = trainer.accelerator.is_main_process
    if not main and not trainer.sharded:
        yield None
        return
    raw = {name: value.clone() for name, value in gather_weights(trainer.model, only_trained=True).items()}
    optimizer = gather_optimizer(trainer.model, trainer.optimizer.optimizer)
    with trainer.ema.applied() if trainer.ema is not None else nullcontext():
        shipped = gather_weights(trainer.model, only_trained=trainer.start.card is not None)
        yield RunState(raw, shipped, optimizer) if main else None


def write_state(trainer: Trainer, state: RunState, folder: Path) -> None:
    """Write the checkpoint of the current step into `folder`."""
    _ship(trainer, state.shipped, folder / PRETRAINED_MODEL_DIR)
    save_training_state(
        folder,
        trainer.step,
        trainer.optimizer,
        trainer.scheduler,
        num_processes=trainer.accelerator.num_processes,
        batch_size=trainer.config.batch_size,
        optim_state_dict=state.optimizer,
    )
    own = folder / TRAINING_STATE_DIR
    save_file(state.raw, own / RAW_WEIGHTS_FILE)
    if trainer.start.adapter is not None:
        save_file({name: state.shipped[name] for name in state.raw}, own / AVERAGED_WEIGHTS_FILE)


def restore_state(trainer: Trainer, checkpoint: Path) -> None:
    """Continue from `checkpoint`, whatever number of processes wrote it. Every process must call this.

    Raises `UserError` if it is damaged or does not fit.
    """
    own = checkpoint / TRAINING_STATE_DIR
    averaged = own / AVERAGED_WEIGHTS_FILE
    if trainer.start.adapter is None:
        averaged = checkpoint / PRETRAINED_MODEL_DIR / WEIGHTS_FILE
    try:
        trainer.step, _, _ = load_training_state(
            checkpoint, trainer.optimizer, trainer.scheduler, load_optimizer=False
        )
        if trainer.ema is not None:
            load_weights(trainer.model, _only_trained(trainer, load_file(averaged)))
            trainer.ema.start(trainer.step)
        load_weights(trainer.model, _only_trained(trainer, load_file(own / RAW_WEIGHTS_FILE)))
        load_optimizer(trainer.model, trainer.optimizer.optimizer, load_optimizer_state_dict(own))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"The training state in {checkpoint} cannot be read ({' '.join(str(error).split())}); delete "
            "that checkpoint to resume from the one before, or start a new run with --init-from."
        ) from None


def _ship(trainer: Trainer, weights: Mapping[str, Tensor], folder: Path) -> None:
    start, loaded = trainer.start, trainer.start.loaded
    if start.card is None:
        state = dict(weights) if start.adapter is None else start.adapter.fold(weights)
        save_checkpoint(
            folder,
            start.policy,
            loaded.preprocessor,
            loaded.postprocessor,
            loaded.contract,
            _manifest(trainer),
            state,
        )
        return
    config = start.adapter.config | {"base_model_name_or_path": str(start.base)}
    place = os.path.relpath(start.base, folder.resolve())
    card = replace(start.card, base_place=place)
    LoraExpert(config, start.adapter.to_peft(weights), card, loaded.contract).save(folder)
    save_manifest(folder, _manifest(trainer))


def _manifest(trainer: Trainer) -> dict[str, Any]:
    config, start = trainer.config, trainer.start
    parameters = dict(trainer.policy.named_parameters())
    facts: dict[str, Any] = {
        "parameters": sum(value.numel() for name, value in parameters.items() if ".lora_" not in name)
    }
    if start.adapter is not None:
        facts |= {"trained_parameters": sum(v.numel() for v in parameters.values() if v.requires_grad)}
    if start.card is not None:
        facts |= {"expert": start.card.name, "base": start.base.name, "base_hash": start.card.base}
    return describe_build(
        trainer.policy,
        seed=config.seed,
        step=trainer.step,
        dataset=[dataset.root.name for dataset in trainer.datasets],
        dataset_hash=[dataset.hash for dataset in trainer.datasets],
        tasks=[list(dataset.chosen_instructions) for dataset in trainer.datasets],
        samples=trainer.step * trainer.samples_per_step,
        precision=trainer.precision,
        init_from=config.init_from.name if config.init_from else None,
        init_from_hash=checkpoint_hash(config.init_from) if config.init_from else None,
        recipe=config.recipe(),
        **facts,
    )


def _only_trained(trainer: Trainer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained parameters among `tensors`; raises `KeyError` if one is missing.

    In one order in all processes: they exchange shards in it.
    """
    trained = (name for name, value in trainer.policy.named_parameters() if value.requires_grad)
    return {name: tensors[name] for name in trained}

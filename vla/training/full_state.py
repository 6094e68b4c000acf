"""Weights and optimizer state, whole and on the CPU, however they are spread over processes.

Names are those of the policy, so that what four processes with shards wrote one process without reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

_GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
_GATHER_TRAINED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_SPREAD = StateDictOptions(full_state_dict=True, strict=False)


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a part of the weights (FSDP)."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gather_weights(model: nn.Module, *, only_trained: bool = False) -> dict[str, Tensor]:
    """Return the state dict; of a sharded model on the main process only, elsewhere it is empty.

    Every process that holds shards must call this. Tensors that are whole, on the CPU and alone in their
    storage are handed out as they are and follow the weights; safetensors does not write those that share
    one, as under DDP. `only_trained` leaves frozen parameters and buffers out.
    """
    state = get_model_state_dict(model, options=_GATHER_TRAINED if only_trained else _GATHER)
    if only_trained:
        trained = {name.removeprefix("module.") for name, p in model.named_parameters() if p.requires_grad}
        state = {name: value for name, value in state.items() if name in trained}
    return {name: value if _is_alone(value) else value.clone() for name, value in state.items()}


def _is_alone(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy whole `weights` into the model, each process taking its shard; others stay as they are.

    Raises `KeyError` for a name that the model does not have and `ValueError` for a shape.
    """
    own = {name.removeprefix("module."): value.shape for name, value in model.state_dict().items()}
    for name, value in weights.items():
        if own[name] != value.shape:
            raise ValueError(f"'{name}' has shape {tuple(value.shape)}, not {tuple(own[name])}")
    set_model_state_dict(model, dict(weights), options=_SPREAD)


def gather_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state by parameter name; see `gather_weights` for sharded models."""
    return get_optimizer_state_dict(model, optimizer, options=_GATHER)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Set what `gather_optimizer` returned, each process taking its shard.

    A parameter that is listed without a state never had a gradient (a head whose labels the dataset lacks)
    and starts fresh. Raises `ValueError` if a trained parameter is not listed at all.
    """
    listed = {name for group in state["param_groups"] for name in group["params"]}
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    if absent := sorted({name.removeprefix("module.") for name in trained} - listed):
        raise ValueError(f"it has no optimizer state for '{absent[0]}'")
    set_optimizer_state_dict(model, optimizer, state, options=_SPREAD)

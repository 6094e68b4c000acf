"""A lone expert as a policy: its base's checkpoint with its update folded in and its own parts in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vla.contract import PolicyContract
from vla.errors import UserError
from vla.experts.lora_expert import BASE_WEIGHTS_FILE, CONFIG_FILE, LoraExpert, base_hash
from vla.policy.checkpoint import LoadedPolicy, load_checkpoint, resolve_checkpoint
from vla.policy.manifest import make_contract
from vla.policy.processor_cogmerge import make_cogmerge_pre_post_processors


def find_base(expert: Path) -> Path:
    """Return the base checkpoint that the expert in the folder `expert` says it was trained on.

    Where it stands relative to the expert on its card, so that both can be moved together, or where the
    adapter's config says; of two different places the one that holds the declared weights. Raises `UserError`
    if it does not say, or if there is nothing any more.
    """
    opened = LoraExpert.load(expert)
    named, card = opened.config.get("base_model_name_or_path"), opened.card
    if not named:
        raise UserError(
            f"The expert {expert} does not say where its base is; write its folder into"
            f" base_model_name_or_path of {CONFIG_FILE}."
        )
    moved = [Path(expert) / card.base_place] if card and card.base_place else []
    places = dict.fromkeys(place.resolve() for place in (*moved, Path(named)) if place.exists())
    if not places:
        raise UserError(
            f"The base of the expert {expert} is not at {named} any more; put it back, or write its new place"
            f" into base_model_name_or_path of {CONFIG_FILE}."
        )
    *others, last = places
    return next((place for place in others if _holds(place, card.base)), last)


def _holds(place: Path, weights: str) -> bool:
    """Whether a checkpoint with these weights, by their hash, stands at `place`."""
    return (place / BASE_WEIGHTS_FILE).is_file() and base_hash(place) == weights


def load_expert_policy(base: Path, expert: Path, device: str = "cpu") -> LoadedPolicy:
    """Load `base` with `expert` on it: ``W + scale · B A``, summed in float32, and its parameters in full.

    The expert's contract, and with it its normalisation statistics, takes the place of the base's. Raises
    `UserError` if the expert was trained on another base or does not fit it.
    """
    adapter = LoraExpert.load(expert)
    folder = resolve_checkpoint(base)
    adapter.require_base(base_hash(folder), folder)
    loaded = load_checkpoint(folder, device)
    _apply(adapter, loaded)
    if adapter.contract is None:
        return loaded
    return replace(with_statistics(loaded, adapter.contract.statistics), path=Path(expert))


def with_statistics(loaded: LoadedPolicy, statistics: Mapping[str, Mapping[str, Any]]) -> LoadedPolicy:
    """Return `loaded` (the same policy object) normalising with other statistics."""
    policy = loaded.policy
    contract: PolicyContract = make_contract(policy.config, loaded.contract.interface, dict(statistics))
    preprocessor, postprocessor = make_cogmerge_pre_post_processors(policy.config, contract.statistics)
    policy.contract = contract
    return replace(loaded, preprocessor=preprocessor, postprocessor=postprocessor, contract=contract)


@torch.no_grad()
def _apply(expert: LoraExpert, loaded: LoadedPolicy) -> None:
    own = loaded.policy.state_dict()  # shares memory with the parameters
    expert.require_fits({name: value.shape for name, value in own.items()})
    for module in expert.modules:
        weight = own[f"{module}.weight"]
        weight.copy_(weight.float() + expert.update(module).dense().to(weight.device))
    for name in expert.full_tensors:
        own[name].copy_(expert.tensors[name])

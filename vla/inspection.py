"""`vla inspect`: what a checkpoint or a preset is made of, without a dataset or a simulator."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from lerobot.configs import FeatureType, PolicyFeature
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vla.contract import ACTION_KEY, IMAGE_PREFIX, STATE_KEY, PolicyContract
from vla.errors import UserError, nearest
from vla.policy.checkpoint import checkpoint_hash, load_checkpoint
from vla.policy.configuration_cogmerge import CogMergeConfig
from vla.policy.modeling_cogmerge import CogMergePolicy
from vla.policy.presets import PRESETS


@dataclass(frozen=True)
class InspectConfig:
    """Show parameters, token schedule, contract and provenance."""

    target: tyro.conf.Positional[str]
    """A checkpoint folder or the name of a preset."""


BANDWIDTH, PEAK = 4.3e12, 790e12
"""Bytes and bf16 operations per second that were measured on an H200, the card of the latency floor."""
TEXT_TOKENS = 24
"""Instruction length for which operations are counted, padding included."""


def inspect(config: InspectConfig) -> None:
    """Print what `config.target` is made of; raise `UserError` if it is neither checkpoint nor preset.

    A preset is laid out on torch's meta device: no weights are allocated, whatever its size.
    """
    console = Console()
    if Path(config.target).exists():
        loaded = load_checkpoint(Path(config.target))
        _print_policy(console, loaded.policy)
        _print_contract(console, loaded.contract)
        _print_facts(console, loaded.manifest | {"sha256": checkpoint_hash(loaded.path)})
    elif config.target in PRESETS:
        with torch.device("meta"):
            policy = preset_policy(config.target)
        _print_policy(console, policy)
    else:
        raise UserError(
            f"'{config.target}' is neither a checkpoint folder nor a preset."
            f"{nearest(config.target, PRESETS)} Presets: {', '.join(PRESETS)}."
        )


def preset_policy(name: str, **changes: Any) -> CogMergePolicy:
    """Build a preset with `changes`, untrained, for LIBERO's interface: two cameras, state 8, action 7."""
    config = CogMergeConfig(preset=name, device="cpu", **changes)
    image = PolicyFeature(FeatureType.VISUAL, (3, config.image_size, config.image_size))
    config.input_features = {IMAGE_PREFIX + camera: image for camera in ("image", "image2")}
    config.input_features[STATE_KEY] = PolicyFeature(FeatureType.STATE, (8,))
    config.output_features = {ACTION_KEY: PolicyFeature(FeatureType.ACTION, (7,))}
    return CogMergePolicy(config, pretrained_backbones=False)


def _print_policy(console: Console, policy: CogMergePolicy) -> None:
    config, model = policy.config, policy.model
    total = sum(parameter.numel() for parameter in policy.parameters())
    operations = count_operations(policy)
    table = _table(console, f"{total:,} parameters", ("part", "parameters", "MFLOP", "floor, us"))
    for name, size in _parts(model):
        flops = operations.get(name, 0)
        table.add_row(name, f"{size:,}", f"{flops / 1e6:,.1f}", f"{1e6 * latency_floor(size, flops):,.1f}")
    flops = operations["total"]
    table.add_row("all", f"{total:,}", f"{flops / 1e6:,.1f}", f"{1e6 * latency_floor(total, flops):,.1f}")
    console.print(table)
    console.print(
        f"one observation, {TEXT_TOKENS} text tokens; floor: reading every weight once in bf16 or computing,"
        " whichever is longer, on an H200",
        style="dim",
    )

    table = _table(console, "Tokens", ("stage", "tokens"))
    for stage, count in count_tokens(policy).items():
        table.add_row(stage, f"{count:g}")
    console.print(table)

    decoder = model.decoder
    title = f"Decoder: how many of {decoder.vision_tokens} vision tokens each layer computes on"
    table = _table(console, title, ("layer", "kept"))
    for layer, count in enumerate(decoder.counts):
        table.add_row(str(layer), f"{count} ({count / decoder.vision_tokens:.0%})")
    console.print(table)
    console.print(
        f"\nchunk of {config.chunk_size} actions, {config.n_action_steps} executed per query; "
        f"action decoder {config.action_decoder}; images {config.image_size}x{config.image_size}"
    )


def count_tokens(policy: CogMergePolicy) -> dict[str, float]:
    """Return the tokens of one observation by stage, with `TEXT_TOKENS` of text."""
    config, model = policy.config, policy.model
    cameras, decoder = len(config.camera_keys), model.decoder
    head = model.action_decoder
    slots = config.action_queries if model.reads_layers else head.slot_count
    others = TEXT_TOKENS + (config.state_dim > 0 and not model.reads_layers) + slots
    patches = {
        f"patches in encoder {i}": cameras * encoder.grid**2
        for i, encoder in enumerate(model.vision.encoders)
    }
    return patches | {
        "vision tokens out of the encoders": decoder.vision_tokens,
        "action slots or queries": slots,
        "in the decoder, a dense layer": others + decoder.vision_tokens,
        "in the decoder, mean of its layers": others + sum(decoder.counts) / len(decoder.counts),
    }


def count_operations(policy: CogMergePolicy) -> dict[str, int]:
    """Return the floating-point operations of one query by direct part of the model, and their ``total``.

    A multiplication and an addition count as two. Counted by torch on the meta device: nothing is computed.
    """
    config = policy.config
    model = _shell(policy.model)
    images = torch.empty(1, len(config.camera_keys), 3, config.image_size, config.image_size, device="meta")
    state = torch.empty(1, config.state_dim, device="meta") if config.state_dim else None
    tokens = torch.empty(1, TEXT_TOKENS, dtype=torch.long, device="meta")
    valid = torch.empty(1, TEXT_TOKENS, dtype=torch.bool, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images, state, tokens, valid)
    counts = {name: sum(by.values()) for name, by in counter.get_flop_counts().items()}
    root = type(model).__name__
    parts = {name: counts.get(f"{root}.{name}", 0) for name, _ in model.named_children()}
    return parts | {"total": counter.get_total_flops()}


def _shell(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device that shares its structure and allocates no weights.

    Built by copying, not from the configuration: deepcopy takes the tensors from its memo.
    """
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in model.parameters()
    }
    memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def latency_floor(parameters: int, flops: int) -> float:
    """Return the seconds below which no implementation can go at batch 1: memory or compute, in bf16."""
    return max(2 * parameters / BANDWIDTH, flops / PEAK)


def _parts(model) -> Iterable[tuple[str, int]]:
    """Parameters of each direct part of the model, and of tensors the model itself holds."""
    for name, child in model.named_children():
        yield name, sum(parameter.numel() for parameter in child.parameters())
    own = sum(parameter.numel() for parameter in model.parameters(recurse=False))
    if own:
        yield "tensors of its own", own


def _print_contract(console: Console, contract: PolicyContract) -> None:
    interface = contract.interface
    table = _table(console, "Contract", ("", "expects"))
    for camera in interface.cameras:
        table.add_row(camera.key, f"{camera.height}x{camera.width} RGB")
    for vector in filter(None, (interface.state, interface.action)):
        mode = contract.normalization.get(vector.key, "none")
        table.add_row(vector.key, f"{vector.dim}: {', '.join(vector.names)} ({mode})")
    table.add_row("action space", str(interface.action_space))
    table.add_row("control rate", f"{interface.control_rate:g} Hz")
    table.add_row("statistics", contract.statistics_hash[:12])
    console.print(table)


def _print_facts(console: Console, facts: dict) -> None:
    table = _table(console, "Provenance", ("", ""))
    for key, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(key, text)
    console.print(table)


def _table(console: Console, title: str, headers: tuple[str, ...]) -> Table:
    """Print the title and return an empty table: rich would wrap a title to the table's width."""
    console.print(f"\n{title}", style="bold", highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for header in headers:
        table.add_column(header)
    return table

"""Weights of OpenVLA, OpenVLA-OFT and CogVLA: what their tensors are called there and here.

Their vision encoders are timm's and become transformers' (query, key and value in one matrix there, three
here); everything else keeps its shape. Nothing is left over in silence: a tensor that no rule reads and that
is not on the list of what the released models throw away themselves is refused, and so is one that lacks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vla.errors import UserError
from vla.policy.presets import DINOV2_LARGE, OPENVLA_PROMPT, SIGLIP_SO400M

#: ``featurizer`` is DINOv2 and ``fused_featurizer`` SigLIP; comments in the released code have it the other
#: way round.
ENCODERS = ("featurizer", "fused_featurizer")
#: Never read by the released models, or not by us: Llama's output head, and what stands behind the
#: second-to-last block of an encoder.
UNREAD = (
    r"language_model\.lm_head\.weight",
    r"language_model\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    r"vision_backbone\.(fused_)?featurizer\.(norm|attn_pool|head|fc_norm)\..*",
)
#: What a policy that starts from OpenVLA learns anew, as OpenVLA-OFT does.
FRESH = ("state_projector.", "action_decoder.")
LISTED = 20


@dataclass(frozen=True)
class Rule:
    """One tensor here is ``combine(*there)``, `there` being names in the released checkpoint."""

    there: tuple[str, ...]
    combine: Callable[..., Tensor]


def normalised_name(name: str) -> str:
    """The name without what wrappers add: DDP's prefix, the FiLM wrapper's second backbone and block."""
    name = name.removeprefix("module.").replace("vision_backbone.vision_backbone.", "vision_backbone.")
    return re.sub(r"(blocks\.\d+)\.block\.", r"\1.", name)


def describe(tensors: Mapping[str, Tensor], text_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `CogMergeConfig` that say what `tensors` (by normalised name) are.

    `text_config` is that of the checkpoint's own ``config.json``: heads cannot be read off a shape.
    """
    aggregates = "vision_backbone.vision_aggr_featurizer" in tensors
    routed = any(".router." in name for name in tensors if name.startswith("language_model."))
    return {
        "parity": True,
        "image_size": _image_size(tensors),
        "vision_backbones": list(ENCODERS),
        "vision_configs": [_encoder_config(tensors, name) for name in ENCODERS],
        "vision_film": f"vision_backbone.{ENCODERS[0]}.blocks.0.scale.weight" in tensors,
        "vision_fusion": "gate" if "featurizer_proj.fc1.weight" in tensors else "concat",
        "vision_reducer": "efa" if aggregates else "none",
        "aggregation_tokens": tensors["vision_backbone.vision_aggr_featurizer"].shape[1] if aggregates else 1,
        "token_pruner": "lfp" if routed else "none",
        "attention_mask": "coupled" if aggregates or routed else "full",
        "decoder_config": _decoder_config(tensors, text_config),
        "prompt": OPENVLA_PROMPT,
        "action_decoder": "coordinate_l1",
        "keyframe": False,
    }


def starts_anew(tensors: Mapping[str, Tensor]) -> bool:
    """Whether `tensors` are OpenVLA's own, which predicts action tokens and has no continuous head."""
    return not any(name.startswith("action_head.") for name in tensors)


def convert(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the state of `model` (a `CogMergeModel`, on any device) with the weights of `tensors`.

    `tensors` go by normalised names. The parts that OpenVLA lacks are drawn anew, as the configuration's
    ``head_seed`` says. Raises `UserError` with the tensors that lack, that nothing reads, or that have
    another shape.
    """
    targets = model.state_dict()
    rules = dict(_rules(model))
    fresh = FRESH if starts_anew(tensors) else ()
    wanted = {name: rule for name, rule in rules.items() if name in targets and not name.startswith(fresh)}
    missing = sorted({name for rule in wanted.values() for name in rule.there} - set(tensors))
    missing += sorted(name for name in targets if name not in rules)
    read = {name for rule in rules.values() for name in rule.there}
    unexpected = sorted(name for name in tensors if name not in read and not _is_unread(name, model))
    if missing or unexpected:
        raise UserError(
            "The checkpoint is not one of OpenVLA, OpenVLA-OFT or CogVLA as released: it lacks"
            f" {_listed(missing)}, and has unexpected {_listed(unexpected)}."
        )
    state = _fresh_parts(model, fresh)
    wrong = []
    for name, rule in wanted.items():
        value = rule.combine(*(tensors[there] for there in rule.there))
        if value.shape != targets[name].shape:
            wrong.append(f"{name} {tuple(value.shape)} instead of {tuple(targets[name].shape)}")
        state[name] = value.contiguous()
    if wrong:
        raise UserError(f"The checkpoint's shapes contradict each other: {_listed(wrong)}.")
    return state


def _rules(model: nn.Module) -> Iterator[tuple[str, Rule]]:
    config = model.config
    for index, encoder in enumerate(model.vision.encoders):
        there = f"vision_backbone.{ENCODERS[index]}."
        dino = config.vision_configs[index]["model_type"] == "dinov2_with_registers"
        here = f"vision.encoders.{index}."
        yield from _embedding_rules(here + "embeddings.", there, dino, encoder.dim)
        for block in range(len(encoder.blocks)):
            yield from _block_rules(f"{here}blocks.{block}.", f"{there}blocks.{block}.", dino)
        if encoder.aggregation is not None:
            yield f"{here}aggregation", Rule((f"vision_backbone.vision_aggr_{ENCODERS[index]}",), _first)
    yield from _projector_rules(config)
    for name in model.decoder.backbone.state_dict():
        yield f"decoder.backbone.{name}", Rule((f"language_model.model.{name}",), _same)
    for name in model.decoder.routers.state_dict():
        layer, _, rest = name.partition(".")
        there = f"language_model.model.layers.{layer}.router.{rest}"
        yield f"decoder.routers.{name}", Rule((there,), _same)
    yield from _pairs({f"state_projector.{2 * i}": f"proprio_projector.fc{i + 1}" for i in range(2)})
    head = {"norm_in": "layer_norm1", "fc_in": "fc1", "norm_out": "layer_norm2", "out": "fc2"}
    for block in range(len(model.action_decoder.blocks)):
        head |= {f"blocks.{block}.{part}": f"mlp_resnet_blocks.{block}.ffn.{part}" for part in (0, 1)}
    yield from _pairs({f"action_decoder.{a}": f"action_head.model.{b}" for a, b in head.items()})


def _embedding_rules(here: str, there: str, dino: bool, dim: int) -> Iterator[tuple[str, Rule]]:
    if not dino:
        yield from _pairs({f"{here}patch_embedding": f"{there}patch_embed.proj"})
        yield f"{here}position_embedding.weight", Rule((f"{there}pos_embed",), _first)
        return
    yield from _pairs({f"{here}patch_embeddings.projection": f"{there}patch_embed.proj"})
    yield f"{here}cls_token", Rule((f"{there}cls_token",), _same)
    yield f"{here}register_tokens", Rule((f"{there}reg_token",), _same)
    # timm adds positions to the patches alone; transformers has one for the class token too.
    with_class = Rule((f"{there}pos_embed",), lambda p: torch.cat([torch.zeros_like(p[:, :1]), p], dim=1))
    yield f"{here}position_embeddings", with_class
    yield f"{here}mask_token", Rule((), lambda: torch.zeros(1, dim))


def _block_rules(here: str, there: str, dino: bool) -> Iterator[tuple[str, Rule]]:
    names = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    if dino:
        attention = [f"attention.attention.{part}" for part in ("query", "key", "value")]
        names |= {"norm1": "norm1", "norm2": "norm2", "attention.output.dense": "attn.proj"}
        for scale in ("1", "2"):
            yield f"{here}layer.layer_scale{scale}.lambda1", Rule((f"{there}ls{scale}.scale_factor",), _same)
    else:
        attention = [f"self_attn.{part}_proj" for part in ("q", "k", "v")]
        names |= {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj"}
    yield from _pairs({f"{here}layer.{a}": f"{there}{b}" for a, b in names.items()})
    for kind in ("weight", "bias"):
        for part, name in enumerate(attention):
            yield f"{here}layer.{name}.{kind}", Rule((f"{there}attn.qkv.{kind}",), _third(part))
        both = (f"{there}scale.{kind}", f"{there}shift.{kind}")
        yield f"{here}film.out.{kind}", Rule(both, lambda *halves: torch.cat(halves))


def _projector_rules(config) -> Iterator[tuple[str, Rule]]:
    if config.vision_fusion == "concat":
        yield from _pairs({f"vision.projectors.0.{2 * i}": f"projector.fc{i + 1}" for i in range(3)})
        return
    for index, name in enumerate(ENCODERS):
        yield from _pairs({f"vision.projectors.{index}.{2 * i}": f"{name}_proj.fc{i + 1}" for i in range(2)})
    yield from _pairs({f"vision.gate.net.{layer}": f"moe_router.router.{layer}" for layer in (0, 2)})


def _pairs(modules: Mapping[str, str]) -> Iterator[tuple[str, Rule]]:
    """Rules for the weight and bias of modules that are the same here and there."""
    for here, there in modules.items():
        for kind in ("weight", "bias"):
            yield f"{here}.{kind}", Rule((f"{there}.{kind}",), _same)


def _same(x: Tensor) -> Tensor:
    return x


def _first(x: Tensor) -> Tensor:
    return x[0]


def _third(part: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.chunk(3)[part].clone()  # a file cannot hold three views of one storage


def _is_unread(name: str, model: nn.Module) -> bool:
    """Whether the released models have `name` but nobody computes with it."""
    for index, encoder in enumerate(model.vision.encoders):
        block = re.match(rf"vision_backbone\.{ENCODERS[index]}\.blocks\.(\d+)\.", name)
        if block:
            return int(block[1]) >= len(encoder.blocks)
    return any(re.fullmatch(pattern, name) for pattern in UNREAD)


def _fresh_parts(model: nn.Module, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Newly drawn values of the parts of `model` under `prefixes`, which are parts of its head."""
    if prefixes:
        with torch.device("cpu"):
            model.build_head()
    return {name: value for name, value in model.state_dict().items() if name.startswith(prefixes)}


def _listed(names: list[str]) -> str:
    if not names:
        return "no tensors"
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} tensors ({', '.join(names[:LISTED])}{more})"


def _encoder_config(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Configuration of a timm encoder from its shapes; both published ones have 16 heads.

    timm's SigLIP so400m computes the exact GELU where transformers' approximates it by tanh.
    """
    there = f"vision_backbone.{name}."
    patch = _shape(tensors, f"{there}patch_embed.proj.weight")
    blocks = {int(n.split(".")[3]) for n in tensors if n.startswith(f"{there}blocks.")}
    inner = _shape(tensors, f"{there}blocks.0.mlp.fc1.weight")[0]
    sizes = {
        "hidden_size": patch[0],
        "patch_size": patch[-1],
        "num_hidden_layers": max(blocks) + 1,
        "image_size": round(_shape(tensors, f"{there}pos_embed")[1] ** 0.5) * patch[-1],
        "hidden_act": "gelu",
    }
    if name == ENCODERS[0]:
        registers = _shape(tensors, f"{there}reg_token")[1]
        return dict(DINOV2_LARGE) | sizes | {"mlp_ratio": inner // patch[0], "num_register_tokens": registers}
    return dict(SIGLIP_SO400M) | sizes | {"intermediate_size": inner}


def _decoder_config(tensors: Mapping[str, Tensor], text_config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama's configuration; what OpenVLA's leaves out has the defaults of transformers' `LlamaConfig`."""
    there = "language_model.model."
    vocabulary, width = _shape(tensors, f"{there}embed_tokens.weight")
    layers = {int(n.split(".")[3]) for n in tensors if n.startswith(f"{there}layers.")}
    heads = text_config.get("num_attention_heads", 32)
    keys = _shape(tensors, f"{there}layers.0.self_attn.k_proj.weight")[0]
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(tensors, f"{there}layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": heads,
        "num_key_value_heads": keys * heads // width,
        "rms_norm_eps": text_config.get("rms_norm_eps", 1e-6),
        "rope_parameters": {"rope_type": "default", "rope_theta": text_config.get("rope_theta", 10000.0)},
        "max_position_embeddings": text_config.get("max_position_embeddings", 2048),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _image_size(tensors: Mapping[str, Tensor]) -> int:
    there = f"vision_backbone.{ENCODERS[0]}."
    patch = _shape(tensors, f"{there}patch_embed.proj.weight")[-1]
    return round(_shape(tensors, f"{there}pos_embed")[1] ** 0.5) * patch


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size:
    if name not in tensors:
        raise UserError(
            f"The checkpoint has no '{name}': it is not one of OpenVLA, OpenVLA-OFT or CogVLA as released."
        )
    return tensors[name].shape

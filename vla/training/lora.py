"""LoRA through PEFT: factors on a frozen policy's linear layers, and a few modules trained in full.

``h = W x + (α/r) B A x`` with `W` frozen, `A` (r, n) random and `B` (m, r) zero at the start (arXiv
2106.09685), so that training starts from exactly the frozen policy. What is trained in full starts there too.

PEFT puts its layers into the policy in place: the policy keeps its class, and only the names inside adapted
layers change (``q_proj.base_layer.weight``, ``q_proj.lora_A.default.weight``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from vla.errors import UserError, nearest
from vla.experts.lora_expert import make_config

#: What instructions steer, and the head, which reads the robot's state and gives actions (`head_parts` says
#: what of it merges, the state projector by averaging, as in MergeVLA). They are small, and low rank is a
#: poor fit for them: FiLM and routers start near zero, states and actions are narrower than the rank. Slots
#: stay the base's: PEFT keeps whole modules only, and would lose a lone parameter on the way there and back.
FULL = ("routers", "film", "state_projector", "action_decoder", "keyframe_head")
RANK = 16
SCALE = 2.0  # MergeVLA's α = 2r
_ADAPTER = "default"
_LORA = (f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight")


@dataclass(frozen=True)
class LoraSettings:
    """How an adapter is made.

    A module is named in full, by the end of its name (``q_proj``) or by a glob (``*.layers.3.*``).
    """

    rank: int | None = None
    """Rank of the factors: 16 for an expert; without --expert, giving it turns LoRA on."""
    alpha: float | None = None
    """Numerator of the update's scale, alpha / rank; by default the scale is 2."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), for ranks above 64 (arXiv 2312.03732)."""
    targets: tuple[str, ...] = ()
    """Linear layers that get factors; by default all that are not trained in full."""
    full: tuple[str, ...] = FULL
    """Modules or single parameters that are trained in full."""

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--lora.{name} is {value}; it must be positive.")


@dataclass(frozen=True)
class Adapter:
    """What LoRA made of a policy.

    `rank` and `alpha` are those of every layer in `modules`; `full` names the modules that are trained in
    full. All names are those of the policy without the adapter.
    """

    rank: int
    alpha: float
    rslora: bool
    modules: tuple[str, ...]
    full: tuple[str, ...]

    @property
    def scale(self) -> float:
        """``α/r``, or ``α/√r`` with rsLoRA."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def config(self) -> dict:
        """The ``adapter_config.json``; single parameters outside of `full` are only in the adapter's file."""
        ranks = dict.fromkeys(self.modules, self.rank)
        return make_config(ranks, self.alpha, rslora=self.rslora, full_modules=self.full)

    def to_peft(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name the trained tensors as an adapter's file does, without its prefix."""
        return {name.replace(f".{_ADAPTER}.weight", ".weight"): value for name, value in trained.items()}

    def round_frozen(self, policy: nn.Module, dtype: torch.dtype) -> None:
        """Keep the frozen layers under the factors in `dtype`, (m, n) and bias each.

        To a training step under autocast to `dtype` it makes no difference, bit for bit, except that it does
        not round them on every call. Not for an adapter that is to be folded into the weights as they were.
        """
        for module in self.modules:
            policy.get_submodule(module).base_layer.to(dtype)

    def fold(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state dict of a policy without adapter that computes the same: ``W + scale · B A``.

        The sum is taken in float32 and rounded once to the weight's dtype.
        """
        frozen = {name: value for name, value in state.items() if not name.endswith(_LORA)}
        folded = {name.replace(".base_layer.", "."): value for name, value in frozen.items()}
        for module in self.modules:
            a, b = (state[module + suffix].float() for suffix in _LORA)
            weight = folded[f"{module}.weight"]
            folded[f"{module}.weight"] = (weight.float() + self.scale * (b @ a)).to(weight.dtype)
        return folded


def adapt(policy: nn.Module, settings: LoraSettings, also_full: Sequence[str] = ()) -> Adapter:
    """Freeze `policy`, give its linear layers factors, and thaw what is trained in full.

    `also_full` names further parameters to train in full. Trained parameters are float32, whatever the frozen
    ones are. Raises `UserError` for a name that matches nothing and where PEFT is not installed.
    """
    full, single = _in_full(policy, settings.full)
    thawed = {name for name, _ in policy.named_parameters() if _inside(name, full)} | single | {*also_full}
    modules = _targets(policy, settings.targets, thawed)
    rank = settings.rank or RANK
    adapter = Adapter(
        rank=rank,
        alpha=settings.alpha or SCALE * (rank**0.5 if settings.rslora else rank),
        rslora=settings.rslora,
        modules=modules,
        full=full,
    )
    _inject(policy, adapter)
    for name, parameter in policy.named_parameters():
        trained = name.endswith(_LORA) or name in thawed
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.float()
    return adapter


def _inject(policy: nn.Module, adapter: Adapter) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError:
        raise UserError("Training with LoRA needs the package peft: pip install peft.") from None
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.rslora,
        target_modules=list(adapter.modules),
        lora_dropout=0.0,
    )
    inject_adapter_in_model(config, policy, _ADAPTER)


def _in_full(policy: nn.Module, patterns: Sequence[str]) -> tuple[tuple[str, ...], set[str]]:
    """What the patterns name: outermost modules with parameters, sorted, and single parameters."""
    tree = {name: module for name, module in policy.named_modules() if name and any(_sizes(module))}
    names = list(tree)
    parameters = [name for name, _ in policy.named_parameters()]
    modules, single = set(), set()
    for pattern in patterns:
        found = {name for name in names if _names(pattern, name)}
        alone = set() if found else {name for name in parameters if _names(pattern, name)}
        # A default may name what this policy was built without, a keyframe head for example.
        if not found and not alone and pattern not in FULL:
            raise UserError(
                f"--lora.full {pattern} matches no module or parameter of the policy."
                f"{nearest(pattern, _ends([*names, *parameters]))}"
            )
        modules |= found
        single |= alone
    outermost = {name for name in modules if not _inside(name, modules)}
    return tuple(sorted(_without_containers(outermost, tree))), single


def _without_containers(names: Iterable[str], tree: Mapping[str, nn.Module]) -> Iterator[str]:
    """Replace lists and dictionaries of modules, which PEFT cannot keep whole, by what they hold."""
    for name in names:
        if isinstance(tree[name], (nn.ModuleDict, nn.ModuleList)):
            children = (f"{name}.{child}" for child, _ in tree[name].named_children())
            yield from _without_containers((child for child in children if child in tree), tree)
        else:
            yield name


def _targets(policy: nn.Module, patterns: Sequence[str], thawed: set[str]) -> tuple[str, ...]:
    """Linear layers that get factors, sorted: those not trained in full, and named if there are patterns."""
    linear = [
        name
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear) and not thawed & {f"{name}.weight", f"{name}.bias"}
    ]
    for pattern in patterns:
        if not any(_names(pattern, name) for name in linear):
            raise UserError(
                f"--lora.targets {pattern} matches no linear layer that is not trained in full."
                f"{nearest(pattern, _ends(linear))}"
            )
    chosen = [name for name in linear if not patterns or any(_names(p, name) for p in patterns)]
    if not chosen:
        raise UserError("No linear layer is left for LoRA factors; shorten --lora.full.")
    return tuple(sorted(chosen))


def _names(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _sizes(module: nn.Module) -> Iterator[int]:
    return (parameter.numel() for parameter in module.parameters())


def _ends(names: Iterable[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names}

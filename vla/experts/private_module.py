"""A module of which experts keep versions of their own: an expert head, a norm, a projector.

Rows are split by expert, each part goes through its expert's version, and the results are put back in the
batch's order. A version is the same module with other parameters in place of those that the expert trained
in full; it shares its submodules, so an expert's LoRA layers work inside it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vla.experts.row_experts import RowExperts


class PrivateModule:
    """Routes the calls of `module` to the versions of the rows' experts until `restore`.

    `versions` holds, per expert, the parameters that it has instead of the module's own, by their names in
    the module; an empty mapping is an expert that uses the base's. `called` says whether a call came since it
    was last set to False.
    """

    def __init__(self, module: nn.Module, rows: RowExperts, versions: list[Mapping[str, Tensor]]):
        self._module, self._rows = module, rows
        self._versions = [_version(module, own) for own in versions]
        self._own = frozenset(expert for expert, own in enumerate(versions) if own)
        self.called = False
        module.forward = self._forward

    def restore(self) -> None:
        """Give the module its own forward back."""
        del self._module.forward

    def missed(self, rows: Tensor) -> bool:
        """Whether an expert among `rows` has its own version and no call has come."""
        return not self.called and not self._own.isdisjoint(rows.tolist())

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        rows = self._rows.current
        own_forward = type(self._module).forward
        if rows is None:
            return own_forward(self._module, *args, **kwargs)
        present = rows.unique().tolist()
        if len(present) == 1:
            return own_forward(self._versions[present[0]], *args, **kwargs)
        length = _leading(args, kwargs)
        k = self._rows.multiplicity(length)
        parts, order = [], []
        for expert in present:
            chosen = self._rows.select(expert)
            index = (chosen[:, None] * k + torch.arange(k)).flatten()
            taken = [_take(value, index, length) for value in args]
            named = {name: _take(value, index, length) for name, value in kwargs.items()}
            with self._rows.set(rows[chosen]):
                parts.append(own_forward(self._versions[expert], *taken, **named))
            order.append(index)
        return _join(parts, torch.cat(order).argsort())


def _version(module: nn.Module, own: Mapping[str, Tensor]) -> nn.Module:
    """The module with `own` in place of some parameters or buffers; everything else is shared."""
    version = copy.copy(module)
    version._parameters, version._buffers = dict(module._parameters), dict(module._buffers)
    for name, value in own.items():
        if name in version._buffers:
            version._buffers[name] = value.to(module._buffers[name])
        else:
            parameter = module._parameters[name]
            version._parameters[name] = nn.Parameter(value.to(parameter), requires_grad=False)
    return version


def _leading(args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Length of the leading axis of the first tensor argument, which every per-row argument shares."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return len(value)
    raise ValueError("a private module was called without a tensor, so its rows cannot be told apart")


def _take(value: Any, index: Tensor, length: int) -> Any:
    """The part of an argument that belongs to the rows in `index`; what has no rows passes unchanged."""
    if isinstance(value, Tensor):
        return value[index] if value.ndim and len(value) == length else value
    if isinstance(value, tuple):
        return tuple(_take(part, index, length) for part in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        f"a private module got a {type(value).__name__}, which cannot be split among the experts of a batch"
    )


def _join(parts: list[Any], inverse: Tensor) -> Any:
    """Concatenate the experts' results along the rows and put them back in the batch's order."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(parts)[inverse]
    if isinstance(first, tuple):
        return tuple(_join(list(part), inverse) for part in zip(*parts, strict=True))
    if is_dataclass(first):
        names = [field.name for field in fields(first)]
        return replace(first, **{n: _join([getattr(p, n) for p in parts], inverse) for n in names})
    raise ValueError(f"a private module returned a {type(first).__name__}, whose rows cannot be put together")

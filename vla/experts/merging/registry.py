"""The merging methods by the names that recipes use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vla.errors import UserError, nearest
from vla.experts.merging.dare import Dare
from vla.experts.merging.emr import Emr
from vla.experts.merging.iso_c import IsoC
from vla.experts.merging.knots import Knots
from vla.experts.merging.least_squares import LeastSquares
from vla.experts.merging.method import MergeMethod
from vla.experts.merging.task_arithmetic import TaskArithmetic
from vla.experts.merging.ties import Ties
from vla.experts.merging.tsv_m import TsvM
from vla.experts.merging.weighted_average import WeightedAverage
from vla.experts.merging.wudi import Wudi

METHODS: dict[str, type[MergeMethod]] = {
    "weighted_average": WeightedAverage,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare": Dare,
    "tsv_m": TsvM,
    "knots": Knots,
    "wudi": Wudi,
    "emr": Emr,
    "iso_c": IsoC,
    "least_squares": LeastSquares,
}


def make_method(name: str, options: Mapping[str, Any] | None = None) -> MergeMethod:
    """Make a method from a recipe's words; raises `UserError` for unknown names, options and types."""
    if name not in METHODS:
        raise UserError(
            f"There is no merging method '{name}'.{nearest(str(name), METHODS)} Choose from"
            f" {', '.join(METHODS)}."
        )
    known = {field.name: type(field.default) for field in fields(METHODS[name])}
    for option, value in (options or {}).items():
        if option not in known:
            raise UserError(
                f"The method '{name}' has no option '{option}'.{nearest(str(option), known)}"
                f" It has: {', '.join(known) or 'none'}."
            )
        accepted = (int, float) if known[option] is float else (known[option],)
        if type(value) not in accepted:
            raise UserError(
                f"The option '{option}' of '{name}' is {value!r}; a {known[option].__name__} is needed."
            )
    return METHODS[name](**(options or {}))

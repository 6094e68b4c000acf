"""Task routers, one file each, by name: which expert should act, from what the first observation shows."""

from __future__ import annotations

from vla.errors import UserError, nearest
from vla.experts.multi_expert import MultiExpertPolicy
from vla.experts.task_routers.language import LanguageRouter
from vla.experts.task_routers.oracle import OracleRouter
from vla.experts.task_routers.probe import ProbeRouter
from vla.experts.task_routers.router import RouterSettings, TaskRouter
from vla.experts.task_routers.value_subspace import ValueSubspaceRouter

TASK_ROUTERS: dict[str, type[TaskRouter]] = {
    "oracle": OracleRouter,
    "language": LanguageRouter,
    "value_subspace": ValueSubspaceRouter,
    "probe": ProbeRouter,
}


def make_task_router(name: str, policy: MultiExpertPolicy, settings: RouterSettings) -> TaskRouter:
    """Make the router `name` for `policy`; raises `UserError` for what it lacks or does not take."""
    require_router(name, settings.parity)
    return TASK_ROUTERS[name](policy, settings)


def require_router(name: str, parity: bool = False) -> None:
    """Raise `UserError` unless there is a router `name`, with a published form if `parity` is asked for."""
    if name not in TASK_ROUTERS:
        raise UserError(
            f"There is no task router '{name}'.{nearest(name, TASK_ROUTERS)} Choose from"
            f" {', '.join(TASK_ROUTERS)}."
        )
    if parity and not TASK_ROUTERS[name].has_published_form:
        raise UserError(f"The task router '{name}' has no published form; leave out the parity option.")

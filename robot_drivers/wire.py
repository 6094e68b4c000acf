"""Cycles and faults as JSON: one form for the pipe between processes and for recordings.

Numbers survive the round trip exactly (`json` writes the shortest decimal that reads back the same), NaN and
infinity included; faults come back as the types that they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vla.errors import UserError

from .driver import DriverInfo, Joint, State
from .faults import (
    BusCorrupt,
    BusTimeout,
    Disconnected,
    DriverFault,
    LimitViolation,
    NotCalibrated,
    ServoFault,
)
from .supervisor import Cycle, Mode, ModeError

PLAIN = {
    it.__name__: it for it in (UserError, ModeError, DriverFault, Disconnected, LimitViolation, NotCalibrated)
}
JOINTS = {it.__name__: it for it in (BusTimeout, BusCorrupt)}
VECTORS = ("q", "dq", "tau", "q_commanded", "temperature", "voltage")


def fault_to_json(fault: UserError | None) -> dict[str, Any] | None:
    """Return a fault as JSON values; a type that is not known here becomes the nearest base that is."""
    if fault is None:
        return None
    if isinstance(fault, ServoFault):
        return {
            "kind": "ServoFault",
            "joint": fault.joint,
            "conditions": list(fault.conditions),
            "advice": fault.advice,
        }
    known = next(it.__name__ for it in type(fault).__mro__ if it.__name__ in PLAIN | JOINTS)
    joints = {"joints": list(fault.joints)} if known in JOINTS else {}
    return {"kind": known, "message": str(fault)} | joints


def fault_from_json(content: Mapping[str, Any] | None) -> UserError | None:
    """Return what `fault_to_json` was given."""
    if content is None:
        return None
    kind = content["kind"]
    if kind == "ServoFault":
        return ServoFault(content["joint"], content["conditions"], content["advice"])
    if kind in JOINTS:
        return JOINTS[kind](content["joints"], content["message"])
    return PLAIN[kind](content["message"])


def state_to_json(state: State | None) -> dict[str, Any] | None:
    """Return a sample as JSON values."""
    if state is None:
        return None
    return {
        "time": state.time,
        "sequence": state.sequence,
        "enabled": list(state.enabled),
        "faults": [fault_to_json(fault) for fault in state.faults],
        **{name: _list(getattr(state, name)) for name in VECTORS},
    }


def state_from_json(content: Mapping[str, Any] | None) -> State | None:
    """Return what `state_to_json` was given."""
    if content is None:
        return None
    return State(
        time=content["time"],
        sequence=content["sequence"],
        enabled=tuple(content["enabled"]),
        faults=tuple(_driver_fault(fault) for fault in content["faults"]),
        **{name: _array(content[name]) for name in VECTORS},
    )


def cycle_to_json(cycle: Cycle) -> dict[str, Any]:
    """Return a control period as JSON values."""
    return {
        "time": cycle.time,
        "mode": cycle.mode.value,
        "asked": None if cycle.asked is None else dict(cycle.asked),
        "sent": _list(cycle.sent),
        "state": state_to_json(cycle.state),
        "fresh": cycle.fresh,
        "interventions": dict(cycle.interventions),
        "fault": fault_to_json(cycle.fault),
    }


def cycle_from_json(content: Mapping[str, Any]) -> Cycle:
    """Return what `cycle_to_json` was given."""
    return Cycle(
        time=content["time"],
        mode=Mode(content["mode"]),
        asked=content["asked"],
        sent=_array(content["sent"]),
        state=state_from_json(content["state"]),
        fresh=content["fresh"],
        interventions=content["interventions"],
        fault=_driver_fault(content["fault"]),
    )


def info_to_json(info: DriverInfo) -> dict[str, Any]:
    """Return an arm's description as JSON values."""
    content = dict(vars(info)) | {"joints": [dict(vars(joint)) for joint in info.joints]}
    return {key: sorted(value) if isinstance(value, frozenset) else value for key, value in content.items()}


def info_from_json(content: Mapping[str, Any]) -> DriverInfo:
    """Return what `info_to_json` was given."""
    sets = {key: frozenset(content[key]) for key in ("modes", "safety", "telemetry")}
    joints = tuple(Joint(**joint) for joint in content["joints"])
    rest = None if content["rest"] is None else tuple(content["rest"])
    return DriverInfo(**{**content, **sets, "joints": joints, "rest": rest})


def _driver_fault(content: Mapping[str, Any] | None) -> DriverFault | None:
    fault = fault_from_json(content)
    return fault if fault is None or isinstance(fault, DriverFault) else DriverFault(str(fault))


def _list(vector: np.ndarray | None) -> list[float] | None:
    return None if vector is None else np.asarray(vector, float).tolist()


def _array(content: list[float] | None) -> np.ndarray | None:
    return None if content is None else np.array(content, float)

"""Before anything moves: is this the arm, are these the cameras, and is this the world that the policy knows?

Every check gives a line, every line that fails its remedy; all are made before any is reported. Nothing here
changes the arm's torque.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.markup import escape
from rich.table import Table

from vla.contract import ACTION_KEY, IMAGE_PREFIX, JOINT_POSITION, ContractError, PolicyContract
from vla.errors import UserError
from vla.robot_drivers import Cycle, DriverFault, DriverInfo
from vla.robot_drivers.cameras import Cameras, Frame
from vla.robot_drivers.workspace import Workspace
from vla.runtime.chunk_scheduling import ChunkScheduler
from vla.runtime.robot.control_loop import observe
from vla.runtime.robot.joint_mapping import JointMapping
from vla.runtime.robot.policy_thread import Policy

Verdict = Literal["ok", "note", "fails"]
COLOURS = {"ok": "green", "note": "yellow", "fails": "bold red"}

HOTTEST = 60.0
"""°C at which a servo is too warm to begin with; the STS3215 lets go at 70."""

BEYOND = 0.05
"""Fraction of a joint's range by which the policy's actions may exceed it before they mean another arm."""

SLOW_CAMERA = 0.7
"""Share of the control rate that a camera's rate should have."""

PROBES = 3
"""Questions to the policy; the first one warms it up and does not count."""


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it stands, what was found, and what to do if it fails."""

    item: str
    verdict: Verdict
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Joints:
    """How the policy's state (None if it reads none) and action belong to the arm's joints."""

    state: JointMapping | None
    action: JointMapping


def map_joints(contract: PolicyContract, info: DriverInfo, convention: str | None) -> Joints:
    """Map the contract's vectors. Raises `ContractError` if one does not fit the arm."""
    need = contract.interface
    state = None if need.state is None else JointMapping.make(need.state, info, convention)
    return Joints(state, JointMapping.make(need.action, info, convention))


def check_action_space(contract: PolicyContract) -> Check:
    """The policy must command joint positions."""
    space = contract.interface.action_space
    if space == JOINT_POSITION:
        return Check("action space", "ok", space)
    return Check(
        "action space",
        "fails",
        f"the policy commands {space or 'nobody knows what'}",
        f"Take a checkpoint that commands {JOINT_POSITION}; a dataset that does not say is trained on with"
        f" --action-space {JOINT_POSITION}.",
    )


def check_joints(contract: PolicyContract, info: DriverInfo | None, convention: str | None) -> list[Check]:
    """Names, units and ranges of state and action against the arm."""
    if info is None:
        return [Check("joints and units", "fails", "not checked", "Put the arm right first.")]
    try:
        joints = map_joints(contract, info, convention)
    except ContractError as error:
        return [Check("joints and units", "fails", "do not fit", str(error))]
    named = convention or "as the contract says"
    return [
        Check("joints and units", "ok", f"{len(info.joints)} joints, units {named}"),
        check_ranges(contract, info, joints.action),
    ]


def check_ranges(contract: PolicyContract, info: DriverInfo, action: JointMapping) -> Check:
    """The actions that were trained on must lie within what the arm is calibrated to.

    Degrees taken for radians, and another arm's calibration, show here.
    """
    statistics = contract.statistics.get(ACTION_KEY, {})
    if not {"min", "max"} <= set(statistics):
        return Check("range of actions", "note", "the checkpoint does not tell")
    low, high = (action.to_setpoint(np.array(statistics[name])) for name in ("min", "max"))
    outside = [
        f"{joint.name} {low[joint.name]:.2f} to {high[joint.name]:.2f} {joint.unit}, the arm"
        f" {joint.lower:.2f} to {joint.upper:.2f}"
        for joint in info.joints
        if min(low[joint.name], high[joint.name]) < joint.lower - BEYOND * (joint.upper - joint.lower)
        or max(low[joint.name], high[joint.name]) > joint.upper + BEYOND * (joint.upper - joint.lower)
    ]
    if not outside:
        return Check("range of actions", "ok", "what was trained on is within the calibrated limits")
    return Check(
        "range of actions",
        "fails",
        "; ".join(outside),
        "The policy was trained in other units or on an arm that was calibrated otherwise: give"
        " --joint-units, or calibrate this arm as the training arm was.",
    )


def check_arm(cycle: Cycle | None, fault: DriverFault | None) -> Check:
    """It answers, carries its calibration, has power, is cool and complains of nothing."""
    if fault is not None or cycle is None or cycle.state is None:
        return Check("arm", "fails", "cannot be used", str(fault or "It gave no sample."))
    state = cycle.state
    if state.faults:
        return Check("arm", "fails", "complains", " ".join(map(str, state.faults)))
    found = ["answers, calibrated"]
    if state.voltage is not None:
        found.append(f"{state.voltage.min():.1f} V")
    if state.temperature is not None:
        found.append(f"{state.temperature.max():.0f} °C")
        if state.temperature.max() > HOTTEST:
            return Check("arm", "fails", ", ".join(found), f"Let it cool down below {HOTTEST:.0f} °C.")
    return Check("arm", "ok", ", ".join(found))


def check_workspace(
    bounds: Sequence[float] | None, info: DriverInfo | None, cycle: Cycle | None
) -> list[Check]:
    """Where the gripper is in the box that was asked for; nothing without one."""
    if bounds is None or info is None or cycle is None or cycle.state is None:
        return []
    workspace = Workspace(bounds, info)
    found = workspace.describe(cycle.state.q)
    if workspace.distance(cycle.state.q) > 0:
        return [Check("workspace", "note", f"{found}: it may only come nearer, until it is inside")]
    return [Check("workspace", "ok", found)]


def check_rate(contract: PolicyContract, info: DriverInfo | None, stale_hold: float) -> Check:
    """The arm must take setpoints as fast as the policy gives them, and not hold still between two.

    `stale_hold` (s) is the age at which the arm does not follow a setpoint any more.
    """
    rate = contract.interface.control_rate
    if 1.5 / rate > stale_hold:
        return Check(
            "control rate",
            "fails",
            f"the policy acts at {rate:g} Hz, the arm holds still after {stale_hold:g} s",
            f"Let it wait longer: --supervisor.stale-hold {2 / rate:.2f}",
        )
    if info is None or rate <= info.control_rate:
        return Check("control rate", "ok", f"{rate:g} Hz" + (f" of {info.control_rate:g}" if info else ""))
    return Check(
        "control rate",
        "fails",
        f"the policy needs {rate:g} Hz, the arm does {info.control_rate:g}",
        "Train on data that was recorded more slowly.",
    )


def check_cameras(contract: PolicyContract, cameras: Cameras, timeout: float) -> list[Check]:
    """Every camera of the contract is there, gives pictures of the right size, and often enough.

    `timeout` (s) is for the first picture of all of them.
    """
    until = time.monotonic() + timeout
    checks = []
    for need in contract.interface.cameras:
        name = need.key.removeprefix(IMAGE_PREFIX)
        item = f"camera {name}"
        thread = cameras.threads.get(name)
        if thread is None:
            given = ", ".join(cameras.threads) or "none"
            checks.append(
                Check(item, "fails", f"not given (given: {given})", f"Say which it is: --cameras {name}=0")
            )
            continue
        frame = thread.wait_for_next(-1, max(until - time.monotonic(), 0.0))
        if frame is None:
            checks.append(
                Check(
                    item, "fails", f"no picture ({thread.why_silent()})", "`lerobot-find-cameras` lists them."
                )
            )
            continue
        checks.append(_check_picture(item, frame, (need.height, need.width), thread, contract))
    known = [need.key.removeprefix(IMAGE_PREFIX) for need in contract.interface.cameras]
    for name in cameras.threads.keys() - set(known):
        checks.append(
            Check(
                f"camera {name}",
                "fails",
                "the policy knows no such camera",
                f"Leave it out, or name it as the policy does: {', '.join(known)}.",
            )
        )
    return checks


def _check_picture(item: str, frame: Frame, size: tuple[int, int], thread, contract: PolicyContract) -> Check:
    found = f"{frame.image.shape[1]}x{frame.image.shape[0]}"
    if frame.image.shape[:2] != size:
        return Check(
            item,
            "fails",
            f"gives {found}",
            f"The policy was trained on {size[1]}x{size[0]}: set the camera to that, width and height.",
        )
    thread.wait_for_next(frame.sequence + 5, 1.0)  # a few more, for a rate to be known
    rate, need = thread.rate, contract.interface.control_rate
    found += f", {rate:.0f} Hz"
    if rate < SLOW_CAMERA * need:
        return Check(item, "note", f"{found}: slower than the policy's {need:g} Hz; more light often helps")
    return Check(item, "ok", found)


def check_policy(
    contract: PolicyContract,
    policy: Policy,
    cycle: Cycle | None,
    cameras: Cameras,
    joints: Joints | None,
    scheduler: ChunkScheduler,
    task: str,
) -> Check:
    """Ask the policy about what is there, and take the time."""
    frames = cameras.latest()
    keys = [camera.key.removeprefix(IMAGE_PREFIX) for camera in contract.interface.cameras]
    if cycle is None or cycle.state is None or joints is None or any(frames.get(key) is None for key in keys):
        return Check("policy", "fails", "not asked", "Put the items above right first.")
    observation = observe(contract, cycle, frames, joints.state, task)
    try:
        seconds = []
        for _ in range(PROBES):
            begin = time.monotonic()
            chunk = np.asarray(policy.act(observation.images, observation.state, task))
            seconds.append(time.monotonic() - begin)
    except UserError as error:
        return Check("policy", "fails", "refuses", str(error))
    if not np.isfinite(chunk).all():
        return Check("policy", "fails", "its actions are not finite", "Take another checkpoint.")
    return _check_latency(max(seconds[1:]), contract, scheduler)


def _check_latency(seconds: float, contract: PolicyContract, scheduler: ChunkScheduler) -> Check:
    """An answer must come before its actions are all due, and before the plan ends for a smooth motion."""
    rate, chunk = contract.interface.control_rate, contract.chunk_size
    found = f"answers in {1e3 * seconds:.0f} ms"
    if seconds >= chunk / rate:
        return Check(
            "policy",
            "fails",
            found,
            f"A chunk of {chunk} actions lasts {1e3 * chunk / rate:.0f} ms: run it on an accelerator, here or"
            " with `vla serve` elsewhere, or take a smaller model.",
        )
    if seconds * rate > chunk - scheduler.horizon:
        return Check("policy", "note", f"{found}; the arm will wait for it at the end of each plan")
    return Check("policy", "ok", found)


def table(checks: Sequence[Check]) -> Table:
    """Return the checks as a table."""
    shown = Table(title="pre-flight: nothing has moved", title_justify="left")
    for column in ("", "item", "found", "remedy"):
        shown.add_column(column, overflow="fold")
    for check in checks:
        colour = COLOURS[check.verdict]
        shown.add_row(f"[{colour}]{check.verdict}[/]", *map(escape, (check.item, check.found, check.remedy)))
    return shown


def require(checks: Sequence[Check]) -> None:
    """Raise `UserError` naming the items that fail."""
    failing = [check.item for check in checks if check.verdict == "fails"]
    if failing:
        raise UserError(f"Not started, nothing has moved: {', '.join(failing)}; the table says what to do.")

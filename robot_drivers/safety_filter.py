"""Between a policy and an arm: whatever is asked, what is sent stays inside the limits.

The filter is a pure function, ``(state, now, setpoint, measured) -> (state, q, interventions)``. Per joint,
with commanded position q, commanded velocity v and elapsed time Δ, it picks a velocity v' and sends
q' = q + v'Δ such that

    |v'| ≤ v_max                                   velocity
    |v' − v| ≤ a_max Δ                             acceleration
    q' + v'² / 2a_max ≤ upper,  v' > 0             it can still brake before the limit
    q' − v'² / 2a_max ≥ lower,  v' < 0

These can always be met together: braking by a_max Δ shortens q + v²/2a by aΔ²/2, so that a state which
could brake in time still can after the step, however irregular the calls are.

Within those bounds a setpoint is met exactly, where that leaves the joint no faster against it than one step
can brake, |v' − u| ≤ a_max Δ with the setpoint's own velocity u: a well-behaved policy is not altered. Any
other setpoint is approached on the fastest trapezoid that stops there.

With a `workspace`, v' is moreover blended with braking, v' ← v_b + λ (v' − v_b), by the largest λ of `BLENDS`
for which the gripper certainly stays in its box while the arm brakes from there; λ = 0 inherits that from the
step before. A gripper that is outside, because the arm was enabled there, may only come nearer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vla.errors import UserError

from .driver import DriverInfo
from .faults import LimitViolation

if TYPE_CHECKING:
    from .workspace import Workspace

LONGEST_STEP = 0.1
"""Seconds. A caller that was away for longer finds the arm at rest and sets off from standstill."""

SHORTEST_STEP = 1e-4
"""Seconds. Calls closer together than this send the same position again."""

BLENDS = (1.0, 0.7, 0.4, 0.2, 0.1, 0.0)
"""Shares of what was wanted, the rest braking, that are tried in turn where a workspace is near its end."""


@dataclass(frozen=True)
class FilterState:
    """What was sent last: time (s, monotonic), position q (J,) and velocity v (J,).

    `target` (J,) is what it was on the way to, bounded; None where it braked or stood.
    """

    time: float
    q: np.ndarray
    v: np.ndarray
    target: np.ndarray | None = None


class Filtered(NamedTuple):
    """The next state, whose `q` is to be sent, and why it is not what was asked, by joint name.

    A setpoint that was refused as a whole is reported under the name ``"setpoint"``.
    """

    state: FilterState
    interventions: dict[str, str]


@dataclass(frozen=True)
class SafetyFilter:
    """Limits of one arm, `margin` and `following_error` in each joint's unit, as a fraction of its range.

    `margin` is kept from both calibrated limits. `following_error` is how far a command may run ahead of
    the measured position: a blocked joint is pushed no further, and does not leap when it comes free.
    `workspace`, if there is one, bounds where the gripper is sent as well.
    """

    info: DriverInfo
    margin: float = 0.01
    following_error: float = 0.12
    workspace: Workspace | None = None

    def __post_init__(self):
        if not 0 <= self.margin < 0.5 or not self.following_error > 0:
            raise UserError(
                f"The safety margin is {self.margin:g} and the following error {self.following_error:g}: give"
                " fractions of the joint range, the margin in [0, 0.5) and the following error above 0."
            )

    def start(self, now: float, measured: np.ndarray) -> FilterState:
        """Return the state of an arm that stands still at `measured` (J,).

        A joint may rest in the margin, or slightly beyond the calibrated limit where it leans on its
        mechanical stop; it is then only let inwards. Raises `LimitViolation` if it is further out.
        """
        measured = np.asarray(measured, float)
        span = self.info.upper - self.info.lower
        q = np.clip(measured, self.info.lower, self.info.upper)
        outside = ~(np.abs(measured - q) <= max(self.margin, 0.01) * span)
        if outside.any():
            where = ", ".join(
                f"'{joint.name}' is at {q:.3f}, allowed {joint.lower:.3f} to {joint.upper:.3f} {joint.unit}"
                for joint, q, out in zip(self.info.joints, measured, outside, strict=True)
                if out
            )
            raise LimitViolation(f"The arm stands outside its limits: {where}. Move it inside by hand.")
        return FilterState(now, q, np.zeros_like(q))

    def step(
        self, state: FilterState, now: float, setpoint: Mapping[str, float] | None, measured: np.ndarray
    ) -> Filtered:
        """Return what to send at time `now` for `setpoint` (joint name to position; None brakes and holds).

        `measured` (J,) is the newest sample. A setpoint with anything but exactly the known joints and
        finite numbers is refused as a whole, and so is one without a finite measurement: the arm brakes.
        Never raises for a bad setpoint, because an arm in motion needs a next command.
        """
        if not SHORTEST_STEP <= now - state.time < math.inf:  # stood still, ran backwards, or is not a number
            return Filtered(state, {"setpoint": "called without time having passed"})
        if now - state.time > LONGEST_STEP:
            state = FilterState(now - LONGEST_STEP, state.q, np.zeros_like(state.v))
        dt = now - state.time
        measured = np.asarray(measured, float)
        interventions: dict[str, str] = {}
        asked = None
        if setpoint is not None:
            try:
                asked = self.vector(setpoint)
                if measured.shape != asked.shape or not np.isfinite(measured).all():
                    raise LimitViolation("There is no finite measurement to compare the setpoint with.")
            except LimitViolation as error:
                asked = None
                interventions["setpoint"] = str(error)
        target = None if asked is None else self._bounded(asked, measured, interventions)
        q, v = self._advance(state, dt, target)
        if self.workspace is not None:
            q, v = self._within_workspace(state, dt, q, v, interventions)
        if asked is not None:
            self._explain(target, q, interventions)
        return Filtered(FilterState(now, q, v, target), interventions)

    def vector(self, setpoint: Mapping[str, float]) -> np.ndarray:
        """Return the setpoint as a finite (J,) array, or raise `LimitViolation`."""
        names = self.info.joint_names
        if set(setpoint) != set(names):
            raise LimitViolation(
                f"The setpoint has joints {sorted(map(str, setpoint))}, the arm {sorted(names)}."
            )
        try:
            asked = np.array([float(setpoint[name]) for name in names])
        except (TypeError, ValueError, OverflowError):
            raise LimitViolation(f"The setpoint {dict(setpoint)!r} is not made of numbers.") from None
        if not np.isfinite(asked).all():
            bad = [name for name, value in zip(names, asked, strict=True) if not math.isfinite(value)]
            raise LimitViolation(f"The setpoint of {bad} is not finite.")
        return asked

    def _bounded(self, asked: np.ndarray, measured: np.ndarray, interventions: dict[str, str]) -> np.ndarray:
        """Return the setpoint inside the limits and near enough to the measured position, (J,)."""
        info, span = self.info, self.info.upper - self.info.lower
        low, high = info.lower + self.margin * span, info.upper - self.margin * span
        inside = np.clip(asked, low, high)
        within = inside if self.workspace is None else self.workspace.draw_in(inside, low, high)
        leash = self.following_error * span
        near = np.clip(within, measured - leash, measured + leash)
        target = np.clip(near, low, high)  # a measurement beyond the limits must not drag the target there
        for i, name in enumerate(info.joint_names):
            if inside[i] != asked[i]:
                interventions[name] = "limit"
            if within[i] != inside[i]:
                interventions[name] = "workspace"
            if target[i] != within[i]:
                interventions[name] = "following error"
        return target

    def _advance(
        self, state: FilterState, dt: float, target: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the next q and v, (J,) each: the module's inequalities. Without a target, brake."""
        info, span = self.info, self.info.upper - self.info.lower
        a = info.acceleration
        # A joint that started in the margin may stay there and return, but not go further out.
        low = np.minimum(info.lower + self.margin * span, state.q)
        high = np.maximum(info.upper - self.margin * span, state.q)
        fastest = np.minimum(
            np.minimum(info.velocity, stopping_velocity(high - state.q, a, dt)), state.v + a * dt
        )
        slowest = np.maximum(
            np.maximum(-info.velocity, -stopping_velocity(state.q - low, a, dt)), state.v - a * dt
        )
        if target is None:
            wanted = np.zeros_like(state.v)
        else:
            gap = target - state.q
            exact = gap / dt
            slack = 1e-7 * a * dt  # what rounding alone makes of a setpoint that is just within reach
            reachable = (slowest - slack <= exact) & (exact <= fastest + slack)
            drift = 0.0 if state.target is None else (target - state.target) / dt
            reachable &= np.abs(exact - drift) <= a * dt + slack  # or it would run past a setpoint at rest
            wanted = np.where(reachable, exact, np.sign(gap) * stopping_velocity(np.abs(gap), a, dt))
        v = np.clip(wanted, slowest, fastest)
        q = state.q + v * dt
        inside = np.clip(q, low, high)  # rounding alone can put q outside
        return inside, np.where(inside == q, v, (inside - state.q) / dt)

    def _within_workspace(
        self, state: FilterState, dt: float, q: np.ndarray, v: np.ndarray, interventions: dict[str, str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return q and v, (J,) each, slowed down as far as the gripper's box demands.

        If even braking led out, or further out, the command stands: an arm that was slowed from the start
        never gets there, but one may be enabled outside, or come from a ramp to rest, which knows no box.
        """
        brake_q, brake_v = self._advance(state, dt, None)
        free = ~self.workspace.moves  # a gripper may close at the wall
        outside = self.workspace.distance(state.q)
        for share in BLENDS:
            there, slowed = (q, v) if share == 1 else (_blend(brake_q, q, share), _blend(brake_v, v, share))
            there, slowed = np.where(free, q, there), np.where(free, v, slowed)
            if outside or not share:
                allowed = self.workspace.distance(there) <= outside
            else:
                allowed = self.workspace.holds_braking(there, slowed)
            if allowed:
                break
        else:
            there, slowed = np.where(free, q, state.q), np.where(free, v, 0.0)
        changed = np.flatnonzero(there != q)
        interventions.update({self.info.joint_names[i]: "workspace" for i in changed})
        return there, slowed

    def _explain(self, target: np.ndarray, q: np.ndarray, interventions: dict[str, str]) -> None:
        """Name the joints that the velocity or acceleration bound keeps from their target."""
        for i, name in enumerate(self.info.joint_names):
            if abs(q[i] - target[i]) > 1e-7 * (self.info.upper[i] - self.info.lower[i]):
                interventions.setdefault(name, "velocity or acceleration")


def _blend(slow: np.ndarray, fast: np.ndarray, share: float) -> np.ndarray:
    """Return the point between both, (J,); never beyond one of them by rounding."""
    return np.clip(slow + share * (fast - slow), np.minimum(slow, fast), np.maximum(slow, fast))


def stopping_velocity(distance: np.ndarray, acceleration: np.ndarray, dt: float) -> np.ndarray:
    """Return the largest v ≥ 0 with v·dt + v²/2a ≤ distance: one more step at v, then braking, fits.

    `distance` (J,) ≥ 0. The positive root is √((a·dt)² + 2a·distance) − a·dt, written without cancellation.
    """
    step, twice = acceleration * dt, 2 * acceleration * distance
    return twice / (np.sqrt(step**2 + twice) + step)

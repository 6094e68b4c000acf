"""How a demonstration is carried out: the ranges (`Style`) and one draw from them (`Manner`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .motion import Limits


@dataclass(frozen=True)
class Style:
    """Ranges from which every demonstration draws its manner; lengths in metres, actions in [-1, 1]."""

    speed: tuple[float, float] = (0.8, 1.0)
    """Largest translation action."""
    approach_height: tuple[float, float] = (0.06, 0.10)
    """How far above a grasp the hand lines up."""
    carry_clearance: tuple[float, float] = (0.025, 0.045)
    """Air under a carried object."""
    grasp_spread: float = 0.03
    """Grasps within this cost of the best are equally likely; 0 always takes the best."""
    waypoint_noise: float = 0.003
    """Standard deviation of a constant offset of where objects are put down."""
    action_noise: float = 0.0
    """Standard deviation of the perturbation of executed translations and rotations, never of the gripper."""
    burst_rate: float = 0.04
    """Chance per step that a burst of noise begins."""
    burst_steps: tuple[int, int] = (4, 12)
    """Length of a burst; within one the noise is nearly constant."""
    start_spread: float = 0.0
    """How far the hand is moved in any direction, half as far up or down, before recording starts. From one
    and the same start the hand's way tells a policy what is wanted, and it need not read."""

    def draw(self, rng: np.random.Generator) -> Manner:
        """Draw the manner of one demonstration."""
        return Manner(
            limits=Limits(speed=float(rng.uniform(*self.speed))),
            approach_height=float(rng.uniform(*self.approach_height)),
            carry_clearance=float(rng.uniform(*self.carry_clearance)),
            grasp_spread=self.grasp_spread,
            waypoint_offset=rng.normal(0.0, 1.0, 2).clip(-2, 2) * self.waypoint_noise,
        )

    def draw_start(self, seed: int) -> np.ndarray:
        """Draw the way (3,) of the hand to its start, m: its own stream, so that manners stay the same."""
        spread = self.start_spread * np.array([1.0, 1.0, 0.5])
        return np.random.default_rng([seed, 2]).uniform(-spread, spread)


DEFAULT = Style()
"""Small diversity, no action noise."""

CLEAN = Style(
    speed=(0.9, 0.9),
    approach_height=(0.08, 0.08),
    carry_clearance=(0.03, 0.03),
    grasp_spread=0.0,
    waypoint_noise=0.0,
)
"""The one deterministic demonstration of a scene."""


@dataclass(frozen=True)
class Manner:
    """The drawn values that the skills of one demonstration share."""

    limits: Limits
    approach_height: float
    carry_clearance: float
    grasp_spread: float
    waypoint_offset: np.ndarray


class BurstNoise:
    """Correlated noise in random bursts (DART, Laskey et al. 2017).

    `deviation` (n,) is its standard deviation, in the units of what it disturbs. Between bursts there is
    none, so every burst shows a deviation and the recovery from it.
    """

    CORRELATION = 0.8

    def __init__(self, style: Style, rng: np.random.Generator, deviation: np.ndarray) -> None:
        self._style, self._rng, self._deviation = style, rng, deviation
        self._left, self._noise = 0, np.zeros(len(deviation))

    def __call__(self) -> np.ndarray | None:
        """Return the noise (n,) of the next step, None between bursts."""
        style, mix = self._style, self.CORRELATION
        if style.action_noise == 0.0:
            return None
        if self._left == 0 and self._rng.random() < style.burst_rate:
            self._left = int(self._rng.integers(style.burst_steps[0], style.burst_steps[1] + 1))
            self._noise = self._fresh()
        if self._left == 0:
            return None
        self._left -= 1
        self._noise = mix * self._noise + np.sqrt(1 - mix**2) * self._fresh()
        return self._noise

    def _fresh(self) -> np.ndarray:
        return self._rng.normal(0.0, self._deviation)


class ActionNoise:
    """Perturbs executed OSC_POSE actions by `BurstNoise`. The gripper entry is never touched."""

    def __init__(self, style: Style, rng: np.random.Generator) -> None:
        scale = np.array([1, 1, 1, 0.3, 0.3, 0.3])  # 1 is 5 cm but half a radian
        self._bursts = BurstNoise(style, rng, style.action_noise * scale)

    def __call__(self, clean: np.ndarray) -> np.ndarray:
        """Return the action to execute in place of `clean` (7,)."""
        noise = self._bursts()
        if noise is None:
            return clean
        executed = clean.copy()
        executed[:6] = np.clip(clean[:6] + noise, -1.0, 1.0)
        return executed

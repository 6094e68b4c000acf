"""The control loop: at the contract's rate, one look at everything and one setpoint for the arm.

The loop waits for nothing but its deadline. The arm samples, filters and commands in a process of its own,
every camera and the policy have a thread; here their newest results are put together. Deadlines are absolute,
so that a late period does not delay the next ones. Whatever goes wrong ends the loop with a sentence; leaving
the arm at rest is the caller's context manager.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from vla.contract import IMAGE_PREFIX, PolicyContract
from vla.errors import UserError
from vla.robot_drivers import Cycle, DriverInfo, Mode
from vla.robot_drivers.cameras import Cameras, Frame
from vla.runtime.chunk_scheduling import ChunkScheduler, Query
from vla.runtime.robot.joint_mapping import JointMapping
from vla.runtime.robot.policy_thread import Answer, Observation, PolicyThread
from vla.runtime.robot.soft_start import SoftStart

WINDOW = 200
"""Control periods, and queries, over which statistics are kept."""


class SteeredArm(Protocol):
    """What the loop needs of `robot_drivers.Arm`."""

    info: DriverInfo

    def latest(self) -> Cycle:
        """Return the newest control period of the arm."""

    def setpoint(self, q: Mapping[str, float], within: float = 0.0) -> None:
        """Post where the joints shall go, and in how many seconds they are due there."""


@dataclass(frozen=True)
class RunEnd:
    """Why a run ended, in a sentence, and whether something failed."""

    reason: str
    failed: bool


@dataclass
class RunStatus:
    """What is going on, for whoever shows it. Times in seconds; deques hold the last `WINDOW`."""

    began: float = 0.0
    periods: int = 0
    missed: int = 0
    """Deadlines that went by unused."""
    starved: int = 0
    """Periods without a planned action, in which the arm held still."""
    queries: int = 0
    late: int = 0
    """Answers that came after all of their actions were due."""
    begins: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    work: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    latency: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    delay: int = 0
    """Control periods that the newest answer took."""
    cycle: Cycle | None = None
    frames: Mapping[str, Frame] = field(default_factory=dict)
    interventions: Mapping[str, str] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Control periods per second."""
        begins = list(self.begins)
        return (len(begins) - 1) / (begins[-1] - begins[0]) if len(begins) > 1 else 0.0


class Listener(Protocol):
    """Who is told what happens, in the loop's thread: must return at once."""

    def observed(self, query: Query, observation: Observation) -> None:
        """The policy was asked."""

    def answered(self, answer: Answer) -> None:
        """The policy answered."""

    def asked_arm(self, now: float, setpoint: Mapping[str, float], cycle: Cycle) -> None:
        """The arm was asked to go somewhere."""


class ControlLoop:
    """Runs one policy on one arm. `max_frame_age` and `policy_timeout` are in seconds."""

    def __init__(
        self,
        arm: SteeredArm,
        cameras: Cameras,
        policy: PolicyThread,
        scheduler: ChunkScheduler,
        contract: PolicyContract,
        joints: tuple[JointMapping | None, JointMapping],
        task: str,
        *,
        max_frame_age: float,
        policy_timeout: float,
        soft_start: float = 2.0,
        listeners: tuple[Listener, ...] = (),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.arm, self.cameras, self.policy, self.scheduler = arm, cameras, policy, scheduler
        self.contract, self.task = contract, task
        self.state_joints, self.action_joints = joints
        self.max_frame_age, self.policy_timeout = max_frame_age, policy_timeout
        self.soft_start = SoftStart(arm.info, soft_start)
        self.listeners = listeners
        self.status = RunStatus()
        self.period = 1 / contract.interface.control_rate
        self._clock, self._sleep = clock, sleep
        self._query: Query | None = None

    def run(self, stop: Callable[[], str | None], seconds: float | None = None) -> RunEnd:
        """Run until `stop` gives a reason, `seconds` have passed, or something fails.

        An exception of the policy that is not a `UserError` is raised as it is.
        """
        self.scheduler.reset()
        status = self.status
        status.began = deadline = self._clock()
        while (reason := stop()) is None:
            now = self._clock()
            if seconds is not None and now - status.began >= seconds:
                return RunEnd(f"The {seconds:g} s of this run are over.", False)
            try:
                end = self._period(now)
            except UserError as error:  # of the arm's process, a camera, the policy or its server
                return RunEnd(str(error), True)
            if end is not None:
                return end
            deadline = self._finish(now, deadline)
        return RunEnd(reason, False)

    def _period(self, now: float) -> RunEnd | None:
        """Do one control period."""
        cycle = self.status.cycle = self.arm.latest()
        if cycle.mode in (Mode.FAULT, Mode.LOST):
            return RunEnd(str(cycle.fault), True)
        if cycle.mode is Mode.REST:
            return RunEnd("The policy said nothing for so long that the arm went to rest.", True)
        self.status.interventions = cycle.interventions
        self.status.frames = frames = self.cameras.fresh(self.max_frame_age)
        self._receive(now)
        if self.scheduler.wants_observation:
            self._ask(now, cycle, frames)
        self._steer(now, cycle)
        return None

    def _receive(self, now: float) -> None:
        """Take in an answer if there is one; raise what the policy raised, or a policy that hangs."""
        answer = self.policy.answer()
        if answer is None:
            waited = 0.0 if self._query is None else now - self._query.time
            if waited > self.policy_timeout:
                raise UserError(f"The policy has not answered for {waited:.1f} s.")
            return
        for listener in self.listeners:
            listener.answered(answer)
        if answer.error is not None:
            raise answer.error
        try:
            arrival = self.scheduler.receive(answer.query, answer.chunk, now)
        except ValueError as error:
            raise UserError(f"The actions cannot be executed: {error}.") from None
        self._query = None
        self.status.latency.append(answer.seconds)
        self.status.delay = arrival.delay
        self.status.late += arrival.used == 0

    def _ask(self, now: float, cycle: Cycle, frames: Mapping[str, Frame]) -> None:
        """Show the policy the newest of everything."""
        self._query = self.scheduler.ask(now)
        observation = observe(self.contract, cycle, frames, self.state_joints, self.task)
        self.policy.ask(self._query, observation)
        self.status.queries += 1
        for listener in self.listeners:
            listener.observed(self._query, observation)

    def _steer(self, now: float, cycle: Cycle) -> None:
        """Send the arm where the plan says; without a plan the supervisor holds it."""
        action = self.scheduler.next_action(now)
        self.status.starved = self.scheduler.starved
        if action is None:
            return
        setpoint = self.soft_start.limit(self.action_joints.to_setpoint(action), cycle.state.q, now)
        self.arm.setpoint(setpoint, within=self.period)
        for listener in self.listeners:
            listener.asked_arm(now, setpoint, cycle)

    def _finish(self, begin: float, deadline: float) -> float:
        """Note the period that began at `begin`, wait for the next deadline and return it."""
        status, now = self.status, self._clock()
        status.periods += 1
        status.begins.append(begin)
        status.work.append(now - begin)
        deadline += self.period
        if now > deadline:
            gone = int((now - deadline) // self.period) + 1
            status.missed += gone
            deadline += gone * self.period
        self._sleep(max(deadline - now, 0.0))
        return deadline


def observe(
    contract: PolicyContract,
    cycle: Cycle,
    frames: Mapping[str, Frame],
    state_joints: JointMapping | None,
    task: str,
) -> Observation:
    """Put together what the contract asks for."""
    images = {
        camera.key: frames[camera.key.removeprefix(IMAGE_PREFIX)].image
        for camera in contract.interface.cameras
    }
    none = np.zeros(0, np.float32)
    state = none if state_joints is None else state_joints.from_joints(cycle.state.q)
    return Observation(images, state, task)

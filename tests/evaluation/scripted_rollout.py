"""A policy and a simulation that follow a script, importable by worker processes.

The simulation succeeds at a step that depends on the episode and on every action so far, so that a
wrong order, a skipped seed or a leaked state changes the outcome. `Trouble` breaks chosen episodes.
"""

import hashlib
import os
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from vla.contract import PolicyContract
from vla.errors import UserError
from vla.policy.routing_report import RoutingReport
from vla.sim.simulation import SimulationError, sim_interface
from vla.sim.suites import load_suite

SIZE = 32
CHUNK = 8


@dataclass(frozen=True)
class ScriptedSource:
    """`skill` in [0, 1] is how soon, hence how often, the policy succeeds."""

    skill: float = 0.5
    label: str = "scripted policy"
    control_rate: float = 20.0
    bad_action: float | None = None

    @property
    def hash(self):
        return hashlib.sha256(f"{self.skill} {self.label}".encode()).hexdigest()

    @property
    def contract(self):
        interface = replace(sim_interface(SIZE), control_rate=self.control_rate)
        return PolicyContract(interface, CHUNK, CHUNK, {}, {})

    @property
    def manifest(self):
        return {"rule": "last step"}

    def load(self):
        return ScriptedPolicy(self)


@dataclass
class ScriptedPolicy:
    source: ScriptedSource
    generator: np.random.Generator = field(default_factory=np.random.default_rng)

    def reset(self, seed):
        self.generator = np.random.default_rng(seed)

    def act(self, images, state, instruction):
        assert images["image"].shape == (SIZE, SIZE, 3) and state.shape == (8,) and instruction
        chunk = self.generator.uniform(-1, 1, (CHUNK, 7)) * 0.5 + state[0] * 0.1
        chunk[:, 6] = self.source.skill
        if self.source.bad_action is not None:
            chunk[3, 2] = self.source.bad_action
        return chunk

    def act_with_report(self, images, state, instruction):
        keys = ("observation.images.image", "observation.images.image2")
        weights = np.random.default_rng(0).dirichlet(np.ones(16), (2, 4)).reshape(2, 4, 4, 4)
        report = RoutingReport(
            keys,
            4,
            {1: np.array([0, 1, 3, 5, 6]), 2: np.array([1, 6])},
            dict(zip(keys, weights.astype(np.float32), strict=True)),
        )
        return self.act(images, state, instruction), report


@dataclass(frozen=True)
class Trouble:
    """How episodes of initial state `init_state` break, on the first `times` attempts."""

    kind: str = "none"
    init_state: int = -1
    times: int = 1
    notes: Path | None = None
    step_seconds: float = 0.0

    def strike(self, episode):
        if self.kind == "none" or episode.init_state != self.init_state:
            return
        before = len(list(self.notes.glob(f"strike-{episode.init_state}-*")))
        if before >= self.times:
            return
        (self.notes / f"strike-{episode.init_state}-{before}").touch()
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "hang":
            time.sleep(60)
        if self.kind == "refuse":
            raise UserError("The scripted simulator has no back-end; install one.")
        raise SimulationError("the physics became unstable")


class ScriptedSimulation:
    language = "put the cube on the plate"

    def __init__(self, suite, task, image_size, trouble):
        self.scene, self.size, self.trouble = (suite, task), image_size, trouble
        self.renders = 0
        if trouble.notes:
            (trouble.notes / f"worker-{os.getpid()}").touch()

    def reset(self, episode, settle_steps):
        assert (episode.suite, episode.task) == self.scene and settle_steps == 10
        self.trouble.strike(episode)
        self.value = np.random.default_rng([episode.seed, episode.init_state]).normal(size=8)
        self.progress = 0.0
        self.goal = 3.0 + 40 * np.random.default_rng(episode.seed).random()

    def step(self, action):
        time.sleep(self.trouble.step_seconds)
        assert np.abs(action).max() <= 1
        self.value = np.cos(self.value + action.sum())
        self.progress += action[6] + 0.1 * self.value[0]
        return bool(self.progress >= self.goal)

    def state(self):
        return self.value.astype(np.float32)

    def images(self):
        self.renders += 1
        shade = np.linspace(40, 220, self.size).astype(np.uint8)
        image = np.stack([np.tile(shade, (self.size, 1)), np.tile(shade[:, None], (1, self.size))], -1)
        image = np.concatenate([image, np.full((self.size, self.size, 1), 90, np.uint8)], -1)
        x = int((self.progress % 10) / 10 * (self.size - 6))
        image[10:16, x : x + 6] = 255
        return {"image": image, "image2": image[::-1].copy()}

    def close(self):
        self.scene = None


@dataclass(frozen=True)
class Simulate:
    """A picklable factory of scripted simulations."""

    trouble: Trouble = Trouble()

    def __call__(self, suite, task, image_size):
        return ScriptedSimulation(suite, task, image_size, self.trouble)


class SpokenScene(ScriptedSimulation):
    """The scripted simulation with the task's own instruction."""

    def __init__(self, suite, task, image_size, trouble):
        super().__init__(suite, task, image_size, trouble)
        self.language = load_suite(suite).task(task).language


@dataclass(frozen=True)
class SpokenSimulate(Simulate):
    """A picklable factory of scripted simulations that say what is asked."""

    def __call__(self, suite, task, image_size):
        return SpokenScene(suite, task, image_size, self.trouble)

"""The inference engine: a checkpoint's answers, faster.

    engine = PolicyEngine(load_checkpoint(path), mode="auto")
    chunk = engine.act(images, state, instruction)          # as `LoadedPolicy.act`, same units, same checks

The whole step, from uint8 images to actions in physical units, is one traced graph per bucket of text length
and batch size. What the instruction alone decides is computed when it is first heard and then kept. On a GPU
the rest is one CUDA graph; on a CPU it runs in one of `MODES`, of which "auto" takes the fastest that changes
the actions by no more than a tolerance (`vla.runtime.probe`).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vla.errors import UserError, nearest
from vla.policy.checkpoint import LoadedPolicy
from vla.policy.routing_report import RoutingReport
from vla.runtime.policy_step import PolicyStep
from vla.runtime.program import MODES, Observation, Program, modes_for

Request = tuple[Mapping[str, np.ndarray], np.ndarray, str]
"""Images by camera, state, instruction; see `LoadedPolicy.act`."""
KEPT_INSTRUCTIONS = 64


class PolicyEngine:
    """Answers like `loaded`, in `mode`: a name of `MODES`, or "auto".

    `tolerance` is the largest relative error of the actions that "auto" accepts (`relative_error`). Programs
    are built when their shapes first occur. Raises `UserError` for a mode that does not exist, or not on the
    checkpoint's device.
    """

    def __init__(self, loaded: LoadedPolicy, mode: str = "auto", tolerance: float = 0.01):
        self.loaded = loaded
        self.device = next(loaded.policy.parameters()).device
        self._step = PolicyStep(loaded)
        if mode == "auto":
            from vla.runtime.probe import fastest_mode

            mode = fastest_mode(loaded, tolerance)
        check_mode(mode, self.device)
        self.mode = mode
        self._programs: dict[tuple[int, int], Program] = {}
        self._instructions: OrderedDict[tuple[str, ...], tuple[Program, tuple[Tensor, ...]]] = OrderedDict()

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, instruction: str) -> np.ndarray:
        """Predict one chunk, (K, D) float32, in the units of the dataset's actions.

        Raises `ContractError` as `LoadedPolicy.act` does.
        """
        return self.act_many([(images, state, instruction)])[0]

    def act_many(self, requests: Sequence[Request]) -> np.ndarray:
        """Predict a chunk for each of at least one request at once, (B, K, D) float32."""
        bucket = 1 << (len(requests) - 1).bit_length()
        filled = [*requests, *[requests[-1]] * (bucket - len(requests))]
        observation = self.observe(filled)
        program, constants = self._heard(tuple(instruction for _, _, instruction in filled), observation)
        return program(observation, constants)[: len(requests)].cpu().numpy()

    def warm_up(self, instruction: str | None = None) -> float:
        """Build the program for one observation and `instruction`; return the seconds of an answer after it.

        Instructions of another bucket of lengths have another program, built when one is first heard.
        """
        from vla.runtime.probe import random_requests

        ((images, state, spoken),) = random_requests(self.loaded.contract, 1)
        self.act(images, state, instruction or spoken)
        begin = time.perf_counter()
        self.act(images, state, instruction or spoken)
        return time.perf_counter() - begin

    def act_with_report(
        self, images: Mapping[str, np.ndarray], state: np.ndarray, instruction: str
    ) -> tuple[np.ndarray, RoutingReport]:
        """Like `act`, and say what the routers did; the report comes from the policy outside the engine."""
        _, report = self.loaded.act_with_report(images, state, instruction)
        return self.act(images, state, instruction), report

    def observe(self, requests: Sequence[Request]) -> Observation:
        """Check `requests` and put their images and states on the device."""
        rows = [self.loaded.batch(*request) for request in requests]
        keys = self._step.config.camera_keys
        images = torch.cat([torch.stack([row[key] for key in keys], dim=1) for row in rows])
        state = torch.empty(len(rows), 0)
        if self._step.config.state_dim:
            state = torch.cat([row["observation.state"] for row in rows])
        return images.to(self.device, non_blocking=True), state.to(self.device, non_blocking=True)

    def _heard(
        self, instructions: tuple[str, ...], observation: Observation
    ) -> tuple[Program, tuple[Tensor, ...]]:
        """The program for `instructions` and what they alone decide, from memory where they were heard."""
        if instructions not in self._instructions:
            tokens, valid = (t.to(self.device) for t in self._step.tokens(list(instructions)))
            shape = tuple(tokens.shape)
            if shape not in self._programs:
                self._programs[shape] = Program(self._step, tokens, valid, observation, MODES[self.mode])
            program = self._programs[shape]
            self._instructions[instructions] = program, program.instruction(tokens, valid)
            if len(self._instructions) > KEPT_INSTRUCTIONS:
                self._instructions.popitem(last=False)
        self._instructions.move_to_end(instructions)
        return self._instructions[instructions]


def check_mode(mode: str, device: torch.device) -> None:
    """Raise `UserError` unless `mode` exists and `device` can run it."""
    known = modes_for(device)
    if mode not in known:
        raise UserError(
            f"The runtime engine has no mode '{mode}' on {device.type}.{nearest(mode, known)}"
            f" Known: {', '.join(known)}."
        )

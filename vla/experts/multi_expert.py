"""One network in memory that acts as any of several experts, and what routers may look at in it.

Experts differ in weights and in normalisation statistics; cameras, sizes and actions are their base's. How
the weights come about is the subclass's business: `vla.experts.bank_policy` computes rows of one batch with
different experts, `vla.experts.merged_policy` switches masks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor, nn

from vla.errors import UserError, nearest
from vla.policy.checkpoint import LoadedPolicy
from vla.policy.processor_cogmerge import InstructionStep
from vla.policy.routing import masked_mean

#: Where the language model stands in the policy; its layers see text first.
DECODER = "model.decoder"


@dataclass(frozen=True)
class Observation:
    """What a policy sees: `images` (H, W, 3) uint8 by camera, `state` float32, `instruction`."""

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    instruction: str


class MultiExpertPolicy(ABC):
    """`base` is the network with the base's statistics, `faces` the same network with each expert's.

    `instructions` holds, per expert, the tasks that it was trained on; `hash` names the base's weights.
    """

    def __init__(
        self,
        base: LoadedPolicy,
        faces: Sequence[LoadedPolicy],
        names: Sequence[str],
        instructions: Sequence[Sequence[str]],
        base_hash: str,
    ):
        self.base, self.faces, self.base_hash = base, tuple(faces), base_hash
        self.names, self.instructions = tuple(names), tuple(map(tuple, instructions))
        self.policy = base.policy.eval()

    def index(self, name: str) -> int:
        """Index of the expert `name`; raises `UserError` if there is none."""
        if name not in self.names:
            raise UserError(
                f"There is no expert '{name}'.{nearest(name, self.names)} There are: {', '.join(self.names)}."
            )
        return self.names.index(name)

    @torch.no_grad()
    def act(self, observations: Sequence[Observation], experts: Sequence[int]) -> list[np.ndarray]:
        """Answer each observation with its own expert: chunks (K, D) in the dataset's units."""
        chunks = self.forward(self.batch(observations, experts), experts)
        return [self.faces[expert].finish(chunks[row : row + 1]) for row, expert in enumerate(experts)]

    def batch(self, observations: Sequence[Observation], experts: Sequence[int] | None) -> dict[str, Tensor]:
        """Preprocess every observation with its expert's statistics (None: the base's) and stack them."""
        faces = [self.base] * len(observations) if experts is None else [self.faces[e] for e in experts]
        return _collate(
            [
                face.preprocessor(face.batch(seen.images, seen.state, seen.instruction))
                for face, seen in zip(faces, observations, strict=True)
            ]
        )

    @abstractmethod
    def forward(self, batch: Mapping[str, Tensor], experts: Sequence[int] | None) -> Tensor:
        """Normalised chunks (B, K, D), row i from ``experts[i]``; None is the base, without any expert."""

    @abstractmethod
    def task_vector(self, expert: int, tensor: str) -> Tensor | None:
        """``τ_m``, what the expert changed in one matrix, float32, or None if it left it alone."""

    @abstractmethod
    def task_weight(self, expert: int, tensor: str) -> Tensor:
        """The expert's own matrix ``W_m``, float32."""

    @torch.no_grad()
    def embed_instruction(self, text: str) -> Tensor:
        """Mean word embedding of `text` in the base, (d,), float32: the condition of every FiLM."""
        step = next(s for s in self.base.preprocessor.steps if isinstance(s, InstructionStep))
        tokens, valid = step.tokenize([text])
        device = next(self.policy.parameters()).device
        embedded = self.policy.model.decoder.embed(tokens.to(device))
        return masked_mean(embedded, valid.to(device))[0].float().cpu()

    @torch.no_grad()
    def inputs_of(self, modules: Sequence[str], seen: Observation) -> dict[str, Tensor]:
        """What each of `modules` reads as every expert sees `seen`, (M, T, n) float32, in one batch.

        Instruction tokens and their padding are left out: they say what was asked, not what is seen.
        """
        experts = range(len(self.names))
        with self._recorded(modules) as inputs:
            self.forward(self.batch([seen] * len(experts), experts), experts)
        return {name: torch.cat(parts).float().cpu() for name, parts in inputs.items()}

    @torch.no_grad()
    def base_features(self, seen: Observation) -> Tensor:
        """What the base alone makes of `seen`, (2 d,) float32.

        The mean vision token and the mean state and action token after the last layer, each of unit length.
        They do not depend on the experts: adding one leaves cached features of the others valid.
        """
        recorded: list[Tensor] = []

        def read(module: nn.Module, args: tuple, output: Tensor) -> None:
            layout = args[1]
            vision, rest = output[:, layout.text : layout.prefix], output[:, layout.prefix :]
            means = [F.normalize(part.float().mean(1), dim=-1) for part in (vision, rest)]
            recorded.append(torch.cat(means, dim=-1)[0].cpu())

        hook = self.policy.get_submodule(DECODER).register_forward_hook(read)
        try:
            self.forward(self.batch([seen], None), None)
        finally:
            hook.remove()
        return recorded[-1]

    @contextmanager
    def _recorded(self, modules: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
        """Collect the inputs of `modules` while the block runs."""
        inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
        text = 0

        def remember_layout(module: nn.Module, args: tuple) -> None:
            nonlocal text
            text = args[1].text

        def record(name: str):
            def hook(module: nn.Module, args: tuple) -> None:
                inputs[name].append(args[0][:, text if name.startswith(DECODER) else 0 :])

            return hook

        with ExitStack() as stack:
            decoder = self.policy.get_submodule(DECODER)
            stack.enter_context(_removing(decoder.register_forward_pre_hook(remember_layout)))
            for name in modules:
                module = self.policy.get_submodule(name)
                stack.enter_context(_removing(module.register_forward_pre_hook(record(name))))
            yield inputs


@contextmanager
def _removing(hook: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


def _collate(samples: Sequence[Mapping[str, object]]) -> dict[str, Tensor]:
    """Stack preprocessed samples of one row each; instructions are padded to the longest."""
    batch = {}
    for key, first in samples[0].items():
        if not isinstance(first, Tensor):
            continue
        rows = [sample[key] for sample in samples]
        if key in (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK):
            width = max(row.shape[1] for row in rows)
            rows = [F.pad(row, (0, width - row.shape[1])) for row in rows]
        batch[key] = torch.cat(rows)
    return batch

"""The head: what of a policy has no pretrained origin, where it starts from, and what of it tasks share.

Averaging parameters of different experts means something only if they started from the same values. A head's
therefore follow from one recorded number, ``head_seed`` in the configuration, and from nothing else: not from
the size of the backbone that was built before, not from the order of construction. In MergeVLA's released
code the heads share their start by an accident of construction order, and any change breaks it silently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

#: Parts of `CogMergeModel`, by name; a policy may lack some.
PARTS = ("state_projector", "action_decoder", "slots", "keyframe_head")


@dataclass(frozen=True)
class HeadParts:
    """Globs on parameter names of a policy, as merge recipes take them; `private` wins over `shared`.

    When experts whose heads were trained in full are merged, `shared` is averaged and each task keeps its
    own `private`: the action decoder's ``private_parts`` and what predicts the keyframe from them. Slots are
    among the shared only of experts that started their head anew; otherwise they stay the base's.
    """

    shared: tuple[str, ...]
    private: tuple[str, ...]


def head_parts(policy: nn.Module) -> HeadParts:
    """Return what of the head of `policy` is shared between tasks and what each keeps."""
    model = policy.model
    shared = ["model.action_decoder.*"]
    if model.state_projector is not None:
        shared.append("model.state_projector.*")
    if model.slots is not None:
        shared.append("model.slots")
    private = [f"model.action_decoder.{glob}" for glob in model.action_decoder.private_parts]
    if model.keyframe_head is not None:
        private.append("model.keyframe_head.*")
    return HeadParts(tuple(shared), tuple(private))


def initialise_head(policy: nn.Module, seed: int) -> None:
    """Give `policy` a new head, started from `seed`, which its configuration then records.

    Two policies of the same sizes get the same head, bit for bit, whatever else they are made of.
    """
    placement = next(policy.model.action_decoder.parameters())
    policy.config.head_seed = seed
    policy.model.build_head()
    for part in PARTS:
        built = getattr(policy.model, part)
        if isinstance(built, nn.Parameter):
            built.data = built.data.to(placement)
        elif built is not None:
            built.to(placement)


@contextmanager
def seeded(seed: int | None, part: str) -> Iterator[None]:
    """Draw initial values of `part` from `seed` and leave torch's own generator as it was.

    With None they come from that generator, as everything else does.
    """
    if seed is None:
        yield
        return
    digest = hashlib.sha256(f"{seed}/{part}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        # Not `torch.manual_seed`: it would also reset the generators of the GPUs.
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little"))
        yield

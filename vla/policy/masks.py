"""Which token may look at which: the coupled mask of CogVLA (CAtten) and the masks it is compared with.

The sequence is ``[text | vision | state | action]``. Everything before the action block is the *prefix*.
Padded text positions are nobody's key in any mask; every first token must be real, so that a padded query
still has a key and its (unread) softmax is finite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Token counts of the sequence ``[text | vision | state | action]``."""

    text: int
    vision: int
    state: int
    action: int

    @property
    def prefix(self) -> int:
        """Tokens before the action block."""
        return self.text + self.vision + self.state

    @property
    def span(self) -> tuple[int, int]:
        """Where vision stands: its first position and the one behind its last."""
        return self.text, self.text + self.vision

    @property
    def length(self) -> int:
        """All tokens."""
        return self.prefix + self.action

    def with_vision(self, tokens: Tensor, vision: Tensor) -> Tensor:
        """`tokens` (B, length, ...) with `vision` (B, k, ...) in place of their vision part."""
        end = self.text + self.vision
        return torch.cat([tokens[:, : self.text], vision, tokens[:, end:]], dim=1)

    def mask(self, name: str, valid: Tensor | None = None) -> CoupledMask:
        """The mask called `name` in `MASKS` over this sequence; `valid` (B, length) marks real tokens."""
        return MASKS[name](self.length, self.prefix, valid, self.span)


@dataclass(frozen=True)
class CoupledMask:
    """Causal over the prefix; the action block sees everything (arXiv 2508.21046, section 3.3).

    `length` tokens, of which the first `prefix` are observed and the rest are the action block; vision
    stands at positions ``vision[0] <= i < vision[1]``; `valid` (B, length) marks real tokens, or is None when
    nothing is padded. Query ``i`` may see key ``j`` iff ``valid[j]`` and (``j <= i`` or ``i >= prefix``).

    Examples with rows = queries, columns = keys, ``1`` = visible::

        length 5, prefix 3            length 3, prefix 3          length 3, prefix 0
        (3 observed, 2 action slots)  (plain causal decoder)      (plain bidirectional encoder)
        1 0 0 | 0 0                   1 0 0                       1 1 1
        1 1 0 | 0 0                   1 1 0                       1 1 1
        1 1 1 | 0 0                   1 1 1                       1 1 1
        ------+----
        1 1 1 | 1 1
        1 1 1 | 1 1

        length 5, prefix 3, valid = 1 0 1 1 1 (the second text token is padding)
        1 0 0 | 0 0
        1 0 0 | 0 0
        1 0 1 | 0 0
        ------+----
        1 0 1 | 1 1
        1 0 1 | 1 1
    """

    length: int
    prefix: int
    valid: Tensor | None = None
    vision: tuple[int, int] = (0, 0)

    @cached_property
    def dense(self) -> Tensor:
        """The mask as booleans, (B or 1, 1, length, length); True = visible."""
        device = None if self.valid is None else self.valid.device
        position = torch.arange(self.length, device=device)
        visible = self.visible(position[:, None], position[None, :])[None, None]
        return visible if self.valid is None else visible & self.valid[:, None, None, :]

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Return whether positions `query` (Q, 1) may see positions `key` (1, K), padding aside: (Q, K)."""
        return (key <= query) | (query >= self.prefix)

    def without(self, dropped: int, valid: Tensor | None) -> CoupledMask:
        """The mask of a subsequence that lost `dropped` vision tokens and kept the order of the rest."""
        first, end = self.vision
        return replace(
            self,
            length=self.length - dropped,
            prefix=self.prefix - dropped,
            valid=valid,
            vision=(first, max(first, end - dropped)),
        )

    def is_vision(self, position: Tensor) -> Tensor:
        """Return which positions hold vision tokens."""
        return (position >= self.vision[0]) & (position < self.vision[1])


class CausalMask(CoupledMask):
    """Causal throughout: an action slot sees the slots before it only, as in an autoregressive decoder."""

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """``j <= i``."""
        return key <= query


class FullMask(CoupledMask):
    """Bidirectional throughout, as OpenVLA-OFT does it (arXiv 2502.19645)."""

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Everything."""
        return torch.ones_like(query | key, dtype=torch.bool)


class ModalityMutualMask(CoupledMask):
    """Coupled, and text also sees vision: modality-mutual attention (AKI, arXiv 2503.02597), text first.

    AKI opens the rectangle above the diagonal between vision and instruction. There vision comes first and
    gains the instruction; here text comes first, vision sees it anyway, and text gains the vision::

        text text vis vis | action
         1    0    1   1  |   0
         1    1    1   1  |   0
         1    1    1   0  |   0
         1    1    1   1  |   0
    """

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Coupled, or text ``i`` before the vision block and vision ``j``."""
        return super().visible(query, key) | ((query < self.vision[0]) & self.is_vision(key))


class NoVisionToVisionMask(CoupledMask):
    """Coupled, but a vision token sees no other vision token (NAAViT of SAISA, arXiv 2502.02458).

    It saves attention without dropping a token: the control against pruning::

        text vis vis | action
         1    0   0  |   0
         1    1   0  |   0
         1    0   1  |   0
    """

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Coupled, except between two different vision tokens."""
        between = self.is_vision(query) & self.is_vision(key) & (query != key)
        return super().visible(query, key) & ~between


MASKS: dict[str, type[CoupledMask]] = {
    "coupled": CoupledMask,
    "causal": CausalMask,
    "full": FullMask,
    "modality_mutual": ModalityMutualMask,
    "no_vision_to_vision": NoVisionToVisionMask,
}
"""Masks by the name that a configuration uses."""

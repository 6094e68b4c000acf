"""Task masks: which merged weights a task uses (TALL-masks, arXiv 2405.07813; MergeVLA section 3).

``S_m = 1[|τ_m| > λ |τ_merge − τ_m|]``, entry by entry and strict, so that λ = 0 keeps every non-zero of
``τ_m``. The task's weights are ``Θ_0 + γ_m S_m ⊙ τ_merge``, with ``γ_m = 1`` unless EMR or a recipe's
`rescale` gives one. There is no test of the sign: an entry may be kept although the merge points against the
task. Masks are stored one bit per weight; those in {-1, 0, 1, 2} as two, see `signed_update`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vla.experts.low_rank import LowRank

#: Entries that are worked on at a time: temporaries stay in the cache, and below what glibc maps and returns
#: block by block (`vla.experts.memory`), which costs a page fault per 4 kB.
BLOCK = 1 << 16


def task_mask(delta: Tensor, merged: Tensor, lam: float) -> Tensor:
    """``S_m = 1[|τ_m| > λ |τ_merge − τ_m|]``: booleans of the shape of `delta`."""
    mask = torch.empty(delta.shape, dtype=torch.bool, device=delta.device)
    for used, own, other in blocks(mask, delta, merged):
        torch.gt(own.abs(), (other - own).abs_().mul_(lam), out=used)
    return mask


def signed_update(merged: Tensor, mask: Tensor, negated: Tensor | None = None) -> Tensor:
    """``S_m ⊙ τ_merge`` in float32: ``S_m`` is 1 at `mask`, -1 at `negated` (if given), 2 at both, else 0."""
    level = mask.to(torch.int8)
    if negated is not None:
        level = level + (2 * level - 1) * negated.to(torch.int8)
    return merged.float() * level


def used_entries(mask: Tensor, negated: Tensor | None) -> Tensor:
    """Where a task uses the merge, in any way."""
    return mask if negated is None else mask | negated


def kept_entries(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where `mask` is set, else 0.

    A product, and not `torch.where`: on the CPU that jumps at every entry, which takes twenty times as long
    where no run of entries goes the same way, as in a task mask.
    """
    return values * mask.view(torch.uint8)  # torch multiplies by bytes three times as fast as by booleans


def projection_scale(delta: Tensor, merged: Tensor, mask: Tensor, negated: Tensor | None = None) -> float:
    """``γ = ‖τ_m‖² / ⟨τ_m, S_m ⊙ α τ_merge⟩``: the part along the task's own update becomes that update.

    What merging took away is given back; what the others left in the masked entries grows with it, across the
    task's own. EMR's rescaler (arXiv 2405.17461) restores a sum of magnitudes instead, over all tensors. 1
    where the two do not point the same way.
    """
    parts = blocks(delta, merged, mask, *([] if negated is None else [negated]))
    return scale_factor(*_sums((own.square(), own * signed_update(*rest)) for own, *rest in parts))


def magnitudes(delta: Tensor, merged: Tensor, mask: Tensor) -> tuple[float, float]:
    """``Σ|τ_m|`` and ``Σ|S_m ⊙ τ_merge|`` of one tensor: what EMR's factor is made of."""
    parts = blocks(delta, merged, mask)
    return _sums((own.abs(), kept_entries(other.abs(), used)) for own, other, used in parts)


def _sums(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Add up the entries of the first and of the second tensors, in float64."""
    first, second = zip(
        *([float(part.sum(dtype=torch.float64)) for part in pair] for pair in pairs), strict=True
    )
    return math.fsum(first), math.fsum(second)


def scale_factor(own: float, used: float) -> float:
    """``own / used`` in float32, in which it is applied, or 1 where nothing is used.

    Sums of many entries differ in their last bits with the number of threads; the rounded factor hardly ever.
    """
    return float(np.float32(own / used)) if used > 0 else 1.0


def pack(mask: Tensor) -> Tensor:
    """Pack booleans of any shape into uint8, (⌈numel/8⌉,).

    Entry ``i`` of the flattened mask is bit ``i % 8`` of byte ``i // 8``, lowest bit first; spare bits are 0.
    """
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little"))


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `pack`, given the mask's shape; raises `ValueError` if the two do not fit."""
    count = torch.Size(shape).numel()
    if packed.dtype != torch.uint8 or packed.shape != ((count + 7) // 8,):
        raise ValueError(f"{packed.dtype} {tuple(packed.shape)} does not hold a mask of shape {tuple(shape)}")
    bits = np.unpackbits(packed.cpu().numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).view(tuple(shape))


def unaligned(update: LowRank, generator: torch.Generator) -> LowRank:
    """The null model of an expert: its update with rows and columns shuffled, ``P τ_m Q``.

    Magnitudes, rank and spectrum stay exactly as they are; only what the experts have in common is lost. A
    ratio that real experts share with their shuffled selves says nothing about the experts.
    """
    m, n = update.shape
    rows, columns = torch.randperm(m, generator=generator), torch.randperm(n, generator=generator)
    return LowRank(update.b[rows], update.a[:, columns])


def blocks(*tensors: Tensor, size: int = BLOCK) -> Iterator[tuple[Tensor, ...]]:
    """The same `size` entries of every tensor at a time, flattened: views of a contiguous tensor."""
    return zip(*(tensor.reshape(-1).split(size) for tensor in tensors), strict=True)


@dataclass
class MaskRatios:
    """Counts over all masked tensors; `keep` is one per expert.

    A weight is *selfish* if exactly one task uses it.
    """

    experts: int
    entries: int = 0
    selfish: int = 0
    kept: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.kept = self.kept or [0] * self.experts

    def add(self, masks: Sequence[Tensor]) -> None:
        """Count one tensor's masks, one per expert."""
        for parts in blocks(*masks):
            users = torch.zeros(parts[0].shape, dtype=torch.int16)
            for m, used in enumerate(parts):
                self.kept[m] += int(used.count_nonzero())
                users += used
            self.selfish += int((users == 1).count_nonzero())
        self.entries += masks[0].numel()

    @property
    def keep_ratios(self) -> list[float]:
        """Fraction of weights that each task uses."""
        return [count / self.entries for count in self.kept]

    @property
    def selfish_ratio(self) -> float:
        """Fraction of weights that exactly one task uses."""
        return self.selfish / self.entries

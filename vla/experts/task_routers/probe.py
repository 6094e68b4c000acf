"""A small classifier on what the base makes of the observation, calibrated on frames that it did not see.

Multinomial logistic regression on standardised features, ``p = softmax((W z + b) / T)``; the temperature
``T`` is fitted on held-out frames (Guo et al., arXiv 1706.04599), so that a margin of 0.2 is a difference of
20 points of probability. Features come from the base alone (`MultiExpertPolicy.base_features`) and are cached
beside the bank: a new expert needs its own frames only, nobody else's data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from vla.atomic import write_bytes
from vla.errors import UserError
from vla.experts.multi_expert import MultiExpertPolicy, Observation
from vla.experts.task_routers.router import RouterSettings, TaskRouter
from vla.experts.tensor_stream import TensorFile

PROBE_FOLDER = "task_router"
PROBE_FILE = "probe.safetensors"
FEATURES_FOLDER = "features"
LEAST_FRAMES = 10  # per expert: eight to fit and two to calibrate
_HELD_OUT = 0.2
_DECAY = 1e-2
_TEMPERATURES = torch.logspace(-1, 1, 201, dtype=torch.float64)  # 0.1 to 10; separable frames would want 0


@dataclass(frozen=True)
class Probe:
    """`weight` (M, f) and `bias` (M,) on features standardised with `mean` and `std` (f,).

    `accuracy` and `calibration_error` (expected, over ten bins) are those of the held-out frames. `base` is
    the hash of the weights that made the features.
    """

    experts: tuple[str, ...]
    base: str
    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    temperature: float
    accuracy: float
    calibration_error: float

    def probabilities(self, features: Tensor) -> Tensor:
        """Probability of each expert for features (..., f): (..., M)."""
        z = (features - self.mean) / self.std
        return ((z @ self.weight.T + self.bias) / self.temperature).softmax(-1)

    def save(self, folder: Path) -> Path:
        """Write into the bank's or merge's folder and return the file's path."""
        tensors = {name: getattr(self, name).contiguous() for name in ("mean", "std", "weight", "bias")}
        facts = {name: repr(getattr(self, name)) for name in ("temperature", "accuracy", "calibration_error")}
        metadata = {"experts": "\n".join(self.experts), "base": self.base, **facts}
        return write_bytes(Path(folder) / PROBE_FOLDER / PROBE_FILE, save(tensors, metadata))

    @classmethod
    def load(cls, folder: Path) -> Probe:
        """Read from the bank's or merge's folder; raises `UserError` if there is none."""
        path = Path(folder) / PROBE_FOLDER / PROBE_FILE
        if not path.exists():
            raise UserError(f"{folder} has no probe; `vla bank fit-probe` fits one.")
        file = TensorFile(path)
        try:
            facts = {n: float(file.metadata[n]) for n in ("temperature", "accuracy", "calibration_error")}
            tensors = {name: file[name] for name in ("mean", "std", "weight", "bias")}
            return cls(tuple(file.metadata["experts"].split("\n")), file.metadata["base"], **tensors, **facts)
        except (KeyError, ValueError) as error:
            raise UserError(f"{path} is malformed ({error}); fit the probe again.") from None


class ProbeRouter(TaskRouter):
    """Scores are calibrated probabilities."""

    own_margin: ClassVar[float] = 0.2

    def __init__(self, policy: MultiExpertPolicy, settings: RouterSettings):
        super().__init__(policy, settings)
        self.probe = Probe.load(settings.folder)
        if set(self.probe.experts) != set(policy.names) or self.probe.base != policy.base_hash:
            raise UserError(
                f"The probe in {settings.folder} was fitted for other experts"
                f" ({', '.join(self.probe.experts)}) or another base; fit it again with `vla bank fit-probe`."
            )
        self._order = [self.probe.experts.index(name) for name in policy.names]

    def scores(self, seen: Observation) -> Tensor:
        """Probability of each expert, (M,)."""
        return self.probe.probabilities(self.policy.base_features(seen))[self._order]


def fit_probe(features: Mapping[str, Tensor], base: str, seed: int = 0) -> Probe:
    """Fit and calibrate on `features`, (N_m, f) per expert. Raises `UserError` for fewer than ten frames."""
    generator = torch.Generator().manual_seed(seed)
    fitting, held = [], []
    for name, rows in features.items():
        if len(rows) < LEAST_FRAMES:
            raise UserError(f"The expert '{name}' has {len(rows)} frames; a probe needs {LEAST_FRAMES}.")
        order, cut = torch.randperm(len(rows), generator=generator), round(len(rows) * _HELD_OUT)
        held.append(rows[order[:cut]].double())
        fitting.append(rows[order[cut:]].double())
    x, labels = torch.cat(fitting), _labels(fitting)
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    weight, bias = _regression((x - mean) / std, labels, len(features))
    logits = (torch.cat(held) - mean) / std @ weight.T + bias
    temperature, accuracy, error = _calibrate(logits, _labels(held))
    return Probe(
        tuple(features),
        base,
        mean.float(),
        std.float(),
        weight.float(),
        bias.float(),
        temperature,
        accuracy,
        error,
    )


def _labels(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.full((len(part),), m) for m, part in enumerate(parts)])


def _regression(z: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Minimise ``CE(W z + b) + λ/2 ‖W‖²`` with L-BFGS; every class counts alike, whatever its size."""
    weight = torch.zeros(classes, z.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    balance = len(labels) / (classes * torch.bincount(labels, minlength=classes).double())
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        entropy = F.cross_entropy(z @ weight.T + bias, labels, balance)
        total = entropy + _DECAY / 2 * weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def _calibrate(logits: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """The temperature of least held-out entropy, and with it accuracy and expected calibration error."""
    losses = torch.stack([F.cross_entropy(logits / t, labels) for t in _TEMPERATURES])
    temperature = float(_TEMPERATURES[losses.argmin()])
    confidence, chosen = (logits / temperature).softmax(-1).max(-1)
    right = (chosen == labels).double()
    bins = (confidence * 10).long().clamp(max=9)
    gaps = [(right[bins == b] - confidence[bins == b]).sum().abs() for b in range(10)]
    return temperature, float(right.mean()), float(torch.stack(gaps).sum() / len(labels))


def save_features(folder: Path, name: str, features: Tensor, base: str) -> Path:
    """Cache an expert's features (N, f) in the bank's or merge's folder."""
    path = Path(folder) / PROBE_FOLDER / FEATURES_FOLDER / f"{name}.safetensors"
    return write_bytes(path, save({"features": features.contiguous()}, {"base": base}))


def load_features(folder: Path, names: Sequence[str], base: str) -> dict[str, Tensor]:
    """Read the cached features of `names`; raises `UserError` naming an expert that has none of this base."""
    found = {}
    for name in names:
        path = Path(folder) / PROBE_FOLDER / FEATURES_FOLDER / f"{name}.safetensors"
        file = TensorFile(path) if path.exists() else None
        if file is None or file.metadata.get("base") != base:
            raise UserError(f"No frames of the expert '{name}' are cached in {folder}; name its dataset.")
        found[name] = file["features"]
    return found

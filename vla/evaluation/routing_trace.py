"""What the routers looked at: the first query of an episode, kept as numbers and drawn as pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla.atomic import write_bytes
from vla.contract import IMAGE_PREFIX
from vla.policy.routing_report import RoutingReport

#: Colour that unlit patches fade to, and the colour of full attention; grey and amber read on any scene.
_SHADE = np.array([28, 30, 38], dtype=np.float32)
_GLOW = np.array([255, 176, 32], dtype=np.float32)


@dataclass(frozen=True)
class RoutingTrace:
    """What the cameras showed, (I, H, W, 3) uint8 in the order of `report.cameras`, and what was routed."""

    images: np.ndarray
    report: RoutingReport

    @classmethod
    def of(cls, images: Mapping[str, np.ndarray], report: RoutingReport) -> RoutingTrace:
        """Join an observation's `images`, named without prefix, with the policy's `report` about it."""
        shown = [images[key.removeprefix(IMAGE_PREFIX)] for key in report.cameras]
        return cls(np.stack(shown), report)

    @property
    def tokens(self) -> int:
        """Vision tokens that enter the decoder."""
        return len(self.report.cameras) * self.report.tokens_per_camera

    def save(self, path: Path) -> Path:
        """Write a compressed ``.npz``, atomically."""
        report, buffer = self.report, io.BytesIO()
        arrays = {f"kept_{layer}": kept for layer, kept in report.kept.items()}
        arrays |= {f"weights_{i}": report.patch_weights[key] for i, key in enumerate(report.cameras)}
        np.savez_compressed(buffer, images=self.images, cameras=np.array(report.cameras), **arrays)
        return write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> RoutingTrace:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            cameras = tuple(map(str, stored["cameras"]))
            weights = {key: stored[f"weights_{i}"] for i, key in enumerate(cameras)}
            kept = {
                int(name.removeprefix("kept_")): stored[name]
                for name in stored.files
                if name.startswith("kept_")
            }
            images = stored["images"]
        return cls(images, RoutingReport(cameras, len(weights[cameras[0]]), kept, weights))

    def heat(self, layer: int | None) -> np.ndarray:
        """Return (I, g, g) in [0, 1]: how much of every patch `layer` still sees; None: before routing.

        A patch counts with its weight in every kept token. The scale is common to all layers and
        cameras, so that pictures of successive layers show what was dropped.
        """
        weights = np.stack([self.report.patch_weights[key] for key in self.report.cameras])
        selected = np.ones(self.tokens, dtype=np.float32)
        if layer is not None:
            selected = np.isin(np.arange(self.tokens), self.report.kept[layer]).astype(np.float32)
        mass = np.einsum("ia,iahw->ihw", selected.reshape(weights.shape[:2]), weights)
        return mass / max(float(weights.sum(axis=1).max()), 1e-12)

    def pictures(self, layer: int | None) -> list[np.ndarray]:
        """Draw `heat` over the camera images: one (H, W, 3) uint8 picture per camera."""
        return [draw_heat(image, heat) for image, heat in zip(self.images, self.heat(layer), strict=True)]


def draw_heat(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Fade `image` (H, W, 3) uint8 where `heat` (g, g) in [0, 1] is low and tint it where it is high."""
    from PIL import Image

    height, width = image.shape[:2]
    small = Image.fromarray((np.sqrt(heat.clip(0, 1)) * 255).astype(np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)[..., None]
    smooth = smooth / 255
    shaded = _SHADE + (image - _SHADE) * (0.25 + 0.75 * smooth)
    tinted = shaded + (_GLOW - shaded) * 0.45 * smooth**2
    return tinted.clip(0, 255).astype(np.uint8)

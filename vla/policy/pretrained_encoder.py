"""EFA-Routing over pretrained encoders: the blocks of a SigLIP or DINOv2, FiLM-ed and aggregated.

The blocks are transformers' own modules, walked here so that FiLM can stand between attention and MLP
(arXiv 2508.21046, section 3.1). As in the paper the features are those of the second-to-last block, without
the final norm; the blocks after it are not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from vla.policy.configuration_cogmerge import patch_grid
from vla.policy.pretrained import blank_vision, load_vision
from vla.policy.reducers import REDUCERS
from vla.policy.residual_norm import residual_norm
from vla.policy.routing import Film


class PretrainedBlock(nn.Module):
    """``x <- (1 + gamma) * (x + A(x)) + beta;  x <- x + M(LN x)`` around one block of an encoder.

    Subclasses know where a family keeps its norms, attention and MLP. Without FiLM it is the plain block.
    """

    def __init__(self, layer: nn.Module, film: Film | None):
        super().__init__()
        self.layer, self.film = layer, film

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (N, T, d) and conditions (N, condition_dim) to tokens (N, T, d)."""
        film = None if self.film is None else self.film.scale_and_shift(condition)
        x, h = residual_norm(x, self.attend(x), self.norm, film)
        return x + self.feed(h)

    def attend(self, x: Tensor) -> Tensor:
        """``A(x)``: norm, self-attention, layer scale."""
        raise NotImplementedError

    @property
    def norm(self) -> nn.LayerNorm:
        """The norm before the MLP."""
        raise NotImplementedError

    def feed(self, h: Tensor) -> Tensor:
        """``M(h)``: MLP, layer scale."""
        raise NotImplementedError

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Queries and keys of `x`, each (N, T, d), and the number of heads."""
        raise NotImplementedError

    @torch.no_grad()
    def attention_map(self, x: Tensor, rows: slice, columns: slice) -> Tensor:
        """Attention of the tokens `rows` over the tokens `columns`, mean over heads, (N, rows, columns)."""
        q, k, heads = self.query_key(x)
        q, k = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k))
        logits = q[:, :, rows] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return logits.float().softmax(-1).mean(1)[..., columns]


class SiglipBlock(PretrainedBlock):
    """A block of `SiglipVisionModel`."""

    def attend(self, x: Tensor) -> Tensor:
        """See `PretrainedBlock`."""
        return self.layer.self_attn(self.layer.layer_norm1(x), attention_mask=None)[0]

    @property
    def norm(self) -> nn.LayerNorm:
        """See `PretrainedBlock`."""
        return self.layer.layer_norm2

    def feed(self, h: Tensor) -> Tensor:
        """See `PretrainedBlock`."""
        return self.layer.mlp(h)

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """See `PretrainedBlock`."""
        h, attention = self.layer.layer_norm1(x), self.layer.self_attn
        return attention.q_proj(h), attention.k_proj(h), attention.num_heads


class Dinov2Block(PretrainedBlock):
    """A block of `Dinov2Model` or `Dinov2WithRegistersModel`."""

    def attend(self, x: Tensor) -> Tensor:
        """See `PretrainedBlock`."""
        layer = self.layer
        return layer.drop_path(layer.layer_scale1(layer.attention(layer.norm1(x))))

    @property
    def norm(self) -> nn.LayerNorm:
        """See `PretrainedBlock`."""
        return self.layer.norm2

    def feed(self, h: Tensor) -> Tensor:
        """See `PretrainedBlock`."""
        layer = self.layer
        return layer.drop_path(layer.layer_scale2(layer.mlp(h)))

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """See `PretrainedBlock`."""
        h, attention = self.layer.norm1(x), self.layer.attention.attention
        return attention.query(h), attention.key(h), attention.num_attention_heads


class PretrainedEncoder(nn.Module):
    """One pretrained encoder: its patches in, A aggregation tokens (or reduced patches) per camera out.

    `settings` is its resolved configuration; with a `source` the weights come from there, else they are
    fresh. Images are resized to a multiple of the patch size and normalised with the encoder's own mean and
    deviation. Aggregation tokens start as N(0, 1) and are the same for every camera, as in the paper.
    """

    def __init__(self, settings: Mapping[str, Any], config, condition_dim: int, source: str | None = None):
        super().__init__()
        self.dim, patch = settings["hidden_size"], settings["patch_size"]
        self.grid = patch_grid(config.image_size, patch)
        self.side, self.cells = self.grid * patch, config.vision_grid
        for name in ("image_mean", "image_std"):
            self.register_buffer(name, torch.tensor(settings[name]).reshape(3, 1, 1), persistent=False)
        model = blank_vision(settings) if source is None else load_vision(source, settings)
        self.embeddings, layers, block = _parts(model)
        self.interpolates = block is SiglipBlock and settings["image_size"] != self.side
        kept = layers[: len(layers) + 1 + config.vision_feature_layer]
        self.blocks = nn.ModuleList(
            block(layer, Film(condition_dim, self.dim) if config.vision_film else None) for layer in kept
        )
        aggregates = config.vision_reducer == "efa"
        self.reduce = None if aggregates else REDUCERS[config.vision_reducer]
        self.aggregation = (
            nn.Parameter(torch.randn(config.aggregation_tokens, self.dim)) if aggregates else None
        )

    def forward(self, images: Tensor, condition: Tensor, trace: dict | None = None) -> Tensor:
        """(B, I, 3, S, S) in [0, 1] and (B, condition_dim) to (B, I * A, dim); `trace`: see `VisionTower`."""
        x = self._embed(images.flatten(0, 1))
        patches = slice(x.shape[1] - self.grid**2, x.shape[1])
        if self.aggregation is not None:
            x = torch.cat([x, self.aggregation.to(x.dtype).expand(len(x), -1, -1)], dim=1)
        condition = condition.repeat_interleave(images.shape[1], dim=0)
        for block in self.blocks[:-1]:
            x = block(x, condition)
        before, x = x, self.blocks[-1](x, condition)
        if self.reduce is None:
            tokens = slice(patches.stop, x.shape[1])
            out = x[:, tokens]
            if trace is not None:
                shares = self.blocks[-1].attention_map(before, tokens, patches)
                trace["patch_weights"] = self._as_map(shares, images)
        else:
            weights = self.reduce(x[:, patches], (self.grid, self.grid), self.cells)
            out = weights @ x[:, patches]
            if trace is not None:
                shares = weights.clamp(min=0) / weights.abs().sum(-1, keepdim=True)
                trace["patch_weights"] = self._as_map(shares.expand(len(x), -1, -1), images)
        return out.reshape(len(images), -1, self.dim)

    def _as_map(self, shares: Tensor, images: Tensor) -> Tensor:
        """Weights over patches (B * I, A, P) as (B, I, A, g, g)."""
        return shares.unflatten(-1, (self.grid, self.grid)).unflatten(0, images.shape[:2])

    def _embed(self, images: Tensor) -> Tensor:
        """Images (N, 3, S, S) to prefix and patch tokens with their positions, (N, prefix + P, dim)."""
        if images.shape[-1] != self.side:
            images = F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True)
        pixels = (images - self.image_mean) / self.image_std
        if self.interpolates:
            return self.embeddings(pixels, interpolate_pos_encoding=True)
        return self.embeddings(pixels)


def _parts(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList, type[PretrainedBlock]]:
    """The embeddings, the blocks and the kind of block of a vision model."""
    if hasattr(model, "vision_model"):
        return model.vision_model.embeddings, model.vision_model.encoder.layers, SiglipBlock
    model.embeddings.mask_token.requires_grad_(False)  # of DINOv2's own training; never read here
    return model.embeddings, model.encoder.layer, Dinov2Block

"""EFA-Routing: vision encoders whose blocks are FiLM-ed by the instruction and whose output is aggregated.

Per camera, P patch tokens enter and A learned aggregation tokens leave (arXiv 2508.21046, section 3.1).
"""

from __future__ import annotations

from itertools import pairwise
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.policy.attention import attend
from vla.policy.routing import EncoderGate, Film


class ConvStem(nn.Module):
    """Overlapping convolutions from pixels to patch tokens; trains from scratch where a patchifier does not.

    A first convolution reduces by 4, each further one by 2 up to `stride`. Two coordinate channels ride
    along with RGB so that features know where inside their patch they are: the arm must hit a can that is
    smaller than a patch.
    """

    def __init__(self, image_size: int, stride: int, width: int, dim: int):
        super().__init__()
        axis = torch.linspace(-1, 1, image_size)
        grid = torch.stack([axis.expand(image_size, -1), axis[:, None].expand(-1, image_size)])
        self.register_buffer("coordinates", grid[None], persistent=False)
        halvings = stride.bit_length() - 3
        widths = [width * 2**i for i in range(halvings)] + [dim]
        convolutions = [nn.Conv2d(3, widths[0], 6, stride=4, padding=1)]
        convolutions += [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)]
        self.convolutions = nn.ModuleList(convolutions)
        self.locate = nn.Conv2d(2, widths[0], 6, stride=4, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(w) for w in widths)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) in [0, 1] to (N, (S / stride)^2, dim)."""
        x = (images * 4 - 2).contiguous(memory_format=torch.channels_last)
        # A convolution is linear: the coordinate channels' share is the same for every image.
        x = self.convolutions[0](x) + self.locate(self.coordinates)
        x = self.norms[0](x.permute(0, 2, 3, 1))
        for convolution, norm in zip(self.convolutions[1:], self.norms[1:], strict=True):
            x = norm(convolution(F.gelu(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x.flatten(1, 2)


class VisionBlock(nn.Module):
    """Pre-norm transformer block with FiLM between attention and MLP: ``x <- (1 + gamma) * x + beta``."""

    def __init__(self, dim: int, heads: int, condition_dim: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.film = Film(condition_dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, condition: Tensor, rows: int | None = None) -> Tensor:
        """Update the first `rows` tokens of `x` (N, T, d), or all, over all T as keys: (N, rows, d)."""
        queries, keys = self._project(x, rows)
        k, v = keys.chunk(2, dim=-1)
        attended = attend(queries, self._split(k), self._split(v))
        x = x[:, :rows] + self.out(attended.transpose(1, 2).flatten(2))
        x = self.film(x, condition)
        return x + self.mlp(self.norm2(x))

    @torch.no_grad()
    def attention_map(self, x: Tensor, rows: int) -> Tensor:
        """Attention of the first `rows` tokens over all of `x`, mean over heads, (N, rows, T)."""
        queries, keys = self._project(x, rows)
        k = self._split(keys.chunk(2, dim=-1)[0])
        logits = queries @ k.transpose(-1, -2) * queries.shape[-1] ** -0.5
        return logits.float().softmax(-1).mean(1)

    def _project(self, x: Tensor, rows: int | None) -> tuple[Tensor, Tensor]:
        h = self.norm1(x)
        return self._split(self.q(h[:, :rows])), self.kv(h)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class AggregationEncoder(nn.Module):
    """One vision encoder: stem, position and camera embeddings, FiLM-ed blocks, A aggregation tokens out.

    The cameras of a sample go through as extra batch entries, in one call. The last block computes only
    the aggregation rows: nothing else leaves. Each aggregation token starts as a learned vector plus the
    mean patch of its own region of the image. The paper starts from the vector alone, which suits a
    pretrained encoder; from scratch, tokens that start equal for every image first have to learn to look
    (a probe task, "find the square of the named colour among four": solved after 500 steps, not at all
    within 600 without the regions).
    """

    def __init__(self, cameras: int, stride: int, config, condition_dim: int):
        super().__init__()
        dim = config.vision_dim
        self.grid = config.image_size // stride
        self.tokens = config.aggregation_tokens
        self.stem = ConvStem(config.image_size, stride, config.stem_width, dim)
        self.position = nn.Parameter(torch.randn(self.grid**2, dim) * 0.02)
        self.regions = _near_square(self.tokens)
        self.aggregation = nn.Parameter(torch.randn(self.tokens, dim) * 0.1)
        self.camera = nn.Parameter(torch.randn(cameras, 1, dim) * 0.02)
        self.blocks = nn.ModuleList(
            VisionBlock(dim, config.vision_heads, condition_dim) for _ in range(config.vision_layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor, condition: Tensor, trace: dict | None = None) -> Tensor:
        """(B, I, 3, S, S) and (B, condition_dim) to (B, I * A, dim); see `VisionTower` for `trace`."""
        batch, cameras = images.shape[:2]
        patches = self.stem(images.flatten(0, 1)) + self.position
        grid = patches.transpose(1, 2).unflatten(-1, (self.grid, self.grid))
        tokens = self.aggregation + F.adaptive_avg_pool2d(grid, self.regions).flatten(2).transpose(1, 2)
        # Aggregation tokens first: the last block then updates a leading slice.
        x = torch.cat([tokens, patches], dim=1)
        x = (x.unflatten(0, (batch, cameras)) + self.camera).flatten(0, 1)
        condition = condition.repeat_interleave(cameras, dim=0)
        for block in self.blocks[:-1]:
            x = block(x, condition)
        if trace is not None:
            over_patches = self.blocks[-1].attention_map(x, self.tokens)[..., self.tokens :]
            trace["patch_weights"] = over_patches.reshape(batch, cameras, self.tokens, self.grid, self.grid)
        x = self.norm(self.blocks[-1](x, condition, rows=self.tokens))
        return x.reshape(batch, cameras * self.tokens, -1)


def _near_square(count: int) -> tuple[int, int]:
    """Rows and columns of the squarest grid of `count` cells: 16 is 4 x 4, 12 is 3 x 4."""
    rows = max(r for r in range(1, isqrt(count) + 1) if count % r == 0)
    return rows, count // rows


class VisionTower(nn.Module):
    """All encoders, each with its projector into the decoder's width, mixed by the instruction's gate."""

    def __init__(self, config, condition_dim: int):
        super().__init__()
        cameras = len(config.camera_keys)
        self.encoders = nn.ModuleList(
            AggregationEncoder(cameras, stride, config, condition_dim) for stride in config.stem_strides
        )
        self.projectors = nn.ModuleList(
            nn.Sequential(
                nn.Linear(config.vision_dim, config.hidden_size),
                nn.GELU(),
                nn.Linear(config.hidden_size, config.hidden_size),
            )
            for _ in config.stem_strides
        )
        many = len(config.stem_strides) > 1
        self.gate = EncoderGate(condition_dim, len(config.stem_strides)) if many else None

    def forward(self, images: Tensor, condition: Tensor, trace: dict | None = None) -> Tensor:
        """Return the vision tokens (B, I * A, hidden_size), camera by camera.

        `images` (B, I, 3, S, S) in [0, 1]. When `trace` is a dict it receives ``patch_weights``
        (B, I, A, g, g): how much of each patch went into each aggregation token of the first encoder.
        """
        streams = [
            project(encode(images, condition, trace if i == 0 else None))
            for i, (encode, project) in enumerate(zip(self.encoders, self.projectors, strict=True))
        ]
        return streams[0] if self.gate is None else self.gate(streams, condition)

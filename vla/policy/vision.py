"""EFA-Routing: vision encoders whose blocks are FiLM-ed by the instruction and whose output is aggregated.

Per camera, P patch tokens enter and A learned aggregation tokens leave (arXiv 2508.21046, section 3.1). Here
stand the encoders that are trained from scratch and the tower that mixes encoders of either kind; those that
come with weights are in `vla.policy.pretrained_encoder`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.kernels.attend import attend
from vla.policy.pretrained_encoder import PretrainedEncoder
from vla.policy.reducers import REDUCERS
from vla.policy.residual_norm import residual_norm
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
        update = self.out(attended.transpose(1, 2).flatten(2))
        x, h = residual_norm(x[:, :rows], update, self.norm2, self.film.scale_and_shift(condition))
        return x + self.mlp(h)

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


class Encoder(nn.Module):
    """What every vision encoder has: stem, position and camera embeddings, FiLM-ed blocks, final norm.

    The cameras of a sample go through as extra batch entries, in one call.
    """

    def __init__(self, cameras: int, stride: int, config, condition_dim: int):
        super().__init__()
        self.dim = dim = config.vision_dim
        self.grid = config.image_size // stride
        self.cells = config.vision_grid
        self.stem = ConvStem(config.image_size, stride, config.stem_width, dim)
        self.position = nn.Parameter(torch.randn(self.grid**2, dim) * 0.02)
        self.camera = nn.Parameter(torch.randn(cameras, 1, dim) * 0.02)
        self.blocks = nn.ModuleList(
            VisionBlock(dim, config.vision_heads, condition_dim) for _ in range(config.vision_layers)
        )
        self.norm = nn.LayerNorm(dim)

    def patches(self, images: Tensor) -> Tensor:
        """(B, I, 3, S, S) to patch tokens with their positions, (B * I, P, dim)."""
        return self.stem(images.flatten(0, 1)) + self.position

    def with_camera(self, tokens: Tensor) -> Tensor:
        """Add the camera's embedding to every token of `tokens` (B * I, T, dim)."""
        return (tokens.unflatten(0, (-1, len(self.camera))) + self.camera).flatten(0, 1)

    def as_map(self, weights: Tensor) -> Tensor:
        """Weights over patches (B * I, A, P) as (B, I, A, g, g)."""
        return weights.unflatten(-1, (self.grid, self.grid)).unflatten(0, (-1, len(self.camera)))


class AggregationEncoder(Encoder):
    """EFA-Routing: A aggregation tokens ride along and are all that leaves.

    The last block computes only the aggregation rows. Each aggregation token starts as a learned vector
    plus the mean patch of its own region of the image. The paper starts from the vector alone, which suits
    a pretrained encoder; from scratch, tokens that start equal for every image first have to learn to look
    (a probe task, "find the square of the named colour among four": solved after 500 steps, not at all
    within 600 without the regions).
    """

    def __init__(self, cameras: int, stride: int, config, condition_dim: int):
        super().__init__(cameras, stride, config, condition_dim)
        self.tokens = config.aggregation_tokens
        self.aggregation = nn.Parameter(torch.randn(self.tokens, config.vision_dim) * 0.1)

    def forward(self, images: Tensor, condition: Tensor, trace: dict | None = None) -> Tensor:
        """(B, I, 3, S, S) and (B, condition_dim) to (B, I * A, dim); see `VisionTower` for `trace`."""
        patches = self.patches(images)
        grid = patches.transpose(1, 2).unflatten(-1, (self.grid, self.grid))
        tokens = self.aggregation + F.adaptive_avg_pool2d(grid, self.cells).flatten(2).transpose(1, 2)
        # Aggregation tokens first: the last block then updates a leading slice.
        x = self.with_camera(torch.cat([tokens, patches], dim=1))
        condition = condition.repeat_interleave(len(self.camera), dim=0)
        for block in self.blocks[:-1]:
            x = block(x, condition)
        if trace is not None:
            over_patches = self.blocks[-1].attention_map(x, self.tokens)[..., self.tokens :]
            trace["patch_weights"] = self.as_map(over_patches)
        x = self.norm(self.blocks[-1](x, condition, rows=self.tokens))
        return x.reshape(len(images), -1, x.shape[-1])


class PatchEncoder(Encoder):
    """The patches go through all blocks and a reducer without knowledge of the instruction follows."""

    def __init__(self, cameras: int, stride: int, config, condition_dim: int):
        super().__init__(cameras, stride, config, condition_dim)
        self.reduce = REDUCERS[config.vision_reducer]

    def forward(self, images: Tensor, condition: Tensor, trace: dict | None = None) -> Tensor:
        """(B, I, 3, S, S) and (B, condition_dim) to (B, I * A, dim); see `VisionTower` for `trace`."""
        x = self.with_camera(self.patches(images))
        condition = condition.repeat_interleave(len(self.camera), dim=0)
        for block in self.blocks:
            x = block(x, condition)
        x = self.norm(x)
        weights = self.reduce(x, (self.grid, self.grid), self.cells)
        if trace is not None:
            shares = weights.clamp(min=0) / weights.abs().sum(-1, keepdim=True)
            trace["patch_weights"] = self.as_map(shares.expand(len(x), -1, -1))
        return (weights @ x).reshape(len(images), -1, x.shape[-1])


class VisionTower(nn.Module):
    """All encoders, projected into the decoder's width and fused.

    ``vision_fusion="gate"`` (CogVLA): one projector per encoder, mixed by weights that the instruction gives,
    ``sum_e alpha_e W_e x_e``. ``"concat"`` (OpenVLA): one projector of the concatenated features.
    """

    def __init__(self, config, condition_dim: int, pretrained: bool = False):
        super().__init__()
        self.encoders = nn.ModuleList(build_encoders(config, condition_dim, pretrained))
        widths, dim = [encoder.dim for encoder in self.encoders], config.hidden_size
        self.concatenates = config.vision_fusion == "concat"
        if self.concatenates:
            self.projectors = nn.ModuleList([concat_projector(sum(widths), dim)])
        else:
            self.projectors = nn.ModuleList(
                nn.Sequential(nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim)) for width in widths
            )
        gated = len(widths) > 1 and not self.concatenates
        self.gate = EncoderGate(condition_dim, len(widths)) if gated else None

    def forward(self, images: Tensor, condition: Tensor, trace: dict | None = None) -> Tensor:
        """Return the vision tokens (B, I * A, hidden_size), camera by camera.

        `images` (B, I, 3, S, S) in [0, 1]. When `trace` is a dict it receives ``patch_weights``
        (B, I, A, g, g): how much of each patch went into each aggregation token of the first encoder.
        """
        features = [
            encode(images, condition, trace if i == 0 else None) for i, encode in enumerate(self.encoders)
        ]
        if self.concatenates:
            return self.projectors[0](torch.cat(features, dim=-1))
        streams = [project(x) for project, x in zip(self.projectors, features, strict=True)]
        return streams[0] if self.gate is None else self.gate(streams, condition)


def build_encoders(config, condition_dim: int, pretrained: bool) -> list[nn.Module]:
    """The vision encoders of `config`; `pretrained` takes weights from where ``vision_backbones`` says."""
    if config.vision_configs:
        sources = config.vision_backbones if pretrained else [None] * len(config.vision_configs)
        return [
            PretrainedEncoder(settings, config, condition_dim, source)
            for settings, source in zip(config.vision_configs, sources, strict=True)
        ]
    encoder = AggregationEncoder if config.vision_reducer == "efa" else PatchEncoder
    cameras = len(config.camera_keys)
    return [encoder(cameras, stride, config, condition_dim) for stride in config.stem_strides]


def concat_projector(width: int, dim: int) -> nn.Sequential:
    """OpenVLA's projector of concatenated features: three layers, four times wider inside."""
    return nn.Sequential(
        nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, dim), nn.GELU(), nn.Linear(dim, dim)
    )

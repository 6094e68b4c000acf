"""Residual, FiLM and norm between attention and MLP: in every block of every encoder and decoder."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from vla.kernels.add_film_norm import add_film_norm
from vla.policy.plain import is_plain
from vla.policy.routing import modulate

RMS_NORMS = (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)


def residual_norm(
    x: Tensor, a: Tensor, norm: nn.Module, film: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``h = (1 + gamma) * (x + a) + beta``, the new stream, and ``norm(h)``, each (B, N, d).

    `x` and `a` (B, N, d); `film` is gamma and beta, each (B, d), or None for the residual alone.
    """
    gamma, beta = film or (None, None)
    if is_plain(norm, *RMS_NORMS):
        return add_film_norm(x, a, gamma, beta, norm.weight, None, "rms", norm.variance_epsilon)
    if is_plain(norm, nn.LayerNorm):
        return add_film_norm(x, a, gamma, beta, norm.weight, norm.bias, "layer", norm.eps)
    h = x + a if film is None else modulate(x + a, *film)
    return h, norm(h)

"""Language backbones: Hugging Face decoders, taken whole: weights, PEFT names and families come free.

Their own `forward` is never called: `vla.policy.decoder.RoutedDecoder` walks their layers.
"""

from __future__ import annotations

from torch import nn
from transformers import (
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

import vla.policy.attention  # noqa: F401  registers what `config.attention` names
from vla.policy.instruction import vocabulary_size
from vla.policy.pretrained import blank_decoder, load_decoder

FAMILIES = {
    "llama": (LlamaConfig, LlamaModel),
    "qwen2": (Qwen2Config, Qwen2Model),
    "qwen3": (Qwen3Config, Qwen3Model),
}


def decoder_backbone(config, pretrained: bool = False) -> PreTrainedModel:
    """Return the decoder that `config` describes, with weights from ``decoder_backbone`` if `pretrained`."""
    if config.decoder_config is None:
        return build_decoder(config, vocabulary_size(config.tokenizer))
    if pretrained and config.decoder_backbone:
        decoder = load_decoder(config.decoder_backbone, config.decoder_config)
    else:
        decoder = blank_decoder(config.decoder_config)
    decoder.config._attn_implementation = config.attention
    return decoder


def build_decoder(config, vocab_size: int) -> PreTrainedModel:
    """Build the decoder named by ``config.decoder`` from its sizes, with fresh weights.

    Hugging Face's initial deviation of 0.02 suits widths in the thousands; at width 128 it leaves every
    layer nearly silent. Embeddings start at 1 because their mean is also the condition of every FiLM, which
    learns in proportion to it. In the probe task of `vla.policy.vision` these scales decide between 500
    steps and more than 600 to the solution.
    """
    config_class, model_class = FAMILIES[config.decoder]
    decoder_config = config_class(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.decoder_layers,
        num_attention_heads=config.decoder_heads,
        num_key_value_heads=config.decoder_kv_heads,
        head_dim=config.hidden_size // config.decoder_heads,  # Qwen3's own default is 128 at any width
        initializer_range=config.hidden_size**-0.5,
        use_cache=False,
    )
    decoder_config._attn_implementation = config.attention
    decoder = model_class(decoder_config)
    nn.init.normal_(decoder.embed_tokens.weight)
    return decoder

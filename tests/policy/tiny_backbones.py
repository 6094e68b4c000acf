"""Hugging Face models small enough to test with, saved to folders as their makers would save them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

DECODERS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
VISION = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
SIGLIP = VISION | {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
DINOV2 = VISION | {"mlp_ratio": 2, "image_size": 56, "patch_size": 8, "layerscale_value": 0.5}


def save_decoder(folder, family="llama", seed=0, **changes):
    """A causal language model of two layers and its tokenizer; returns the folder's name."""
    torch.manual_seed(seed)
    config_class, model_class = DECODERS[family]
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 300,
    }
    model = model_class(config_class(**sizes | changes))
    # Deviations at which every layer says something, which Hugging Face's 0.02 is too small for at width 32.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    model.save_pretrained(folder)
    byte_tokenizer(family).save(str(folder / "tokenizer.json"))
    return str(folder)


def byte_tokenizer(family):
    """Every byte a token, with a first token where the family has one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{symbol: 2 + i for i, symbol in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if family == "llama":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def save_vision(folder, family, seed=1, **changes):
    """A vision encoder of three blocks; returns the folder's name. "siglip" is the two-tower model."""
    torch.manual_seed(seed)
    if family == "siglip":
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = SiglipConfig(
            vision_config=SIGLIP | changes, text_config=text | {"vocab_size": 40, "projection_size": 16}
        )
        model = SiglipModel(config)
    elif family == "siglip_vision_model":
        model = SiglipVisionModel(SiglipVisionConfig(**SIGLIP | changes))
    elif family == "dinov2":
        model = Dinov2Model(Dinov2Config(**DINOV2 | changes))
    else:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINOV2 | changes))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "mask_token" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return str(folder)

"""A tiny language model and PEFT adapters on it, random but trained-looking."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.append(str(Path(__file__).parent))  # for tiny_skills

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=False)).eval()


def randomise(model: torch.nn.Module, seed: int, scale: float = 0.1) -> None:
    """Give every trainable parameter a value that training might have left."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def peft_model(seed: int = 1, **options):
    model = get_peft_model(
        tiny_model(), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR} | options)
    )
    randomise(model, seed)
    return model.eval()


@pytest.fixture
def save_base(tmp_path):
    """Save the tiny model as a base checkpoint and return its folder."""

    def save(name: str = "base", dtype: torch.dtype = torch.float32) -> Path:
        tiny_model().to(dtype).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def save_adapter(tmp_path):
    """Save a PEFT adapter of the tiny model and return (its folder, the PEFT model)."""

    def save(name: str = "skill", seed: int = 1, **options):
        model = peft_model(seed, **options)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name, model

    return save


@pytest.fixture
def edit_json():
    def edit(path: Path, **changes) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


@pytest.fixture
def make_model():
    return tiny_model


@pytest.fixture(scope="session")
def skills(tmp_path_factory):
    """A tiny base and three experts of it, by the names of their folders."""
    from tiny_skills import save_tiny_base, save_tiny_expert

    folder = tmp_path_factory.mktemp("skills")
    base = save_tiny_base(folder / "base")
    tasks = {
        "soup": ("pick up the soup and place it in the basket", "pick up the soup"),
        "drawer": ("open the top drawer of the cabinet",),
        "stove": ("turn on the stove", "turn off the stove"),
    }
    for seed, (name, instructions) in enumerate(tasks.items(), 1):
        save_tiny_expert(folder / name, base, seed, instructions)
    return folder

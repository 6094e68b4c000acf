"""`vla inspect`: counts against a hand-worked case, and nothing allocated for a preset."""

import pytest
import torch

from vla import cli
from vla.inspection import (
    BANDWIDTH,
    PEAK,
    TEXT_TOKENS,
    count_operations,
    count_tokens,
    latency_floor,
    preset_policy,
)


def test_operations_of_a_dense_decoder_are_those_of_the_formula():
    with torch.device("meta"):
        policy = preset_policy("nano", token_pruner="none")
    config = policy.config
    d, m = config.hidden_size, config.intermediate_size
    tokens = TEXT_TOKENS + 2 * config.aggregation_tokens + 1 + config.chunk_size + 1  # state, keyframe slot
    layer = 2 * tokens * (4 * d * d + 3 * d * m) + 2 * 2 * tokens * tokens * d
    rotary = 2 * tokens * (d // config.decoder_heads // 2)  # the table of angles, once
    counted = count_operations(policy)
    assert counted["decoder"] == config.decoder_layers * layer + rotary
    assert counted["state_projector"] == 2 * (8 * d + d * d)
    assert counted["total"] >= sum(value for name, value in counted.items() if name != "total")


def test_pruning_shows_in_the_count():
    with torch.device("meta"):
        dense, pruned = (count_operations(preset_policy("nano", token_pruner=p)) for p in ("none", "lfp"))
    assert pruned["decoder"] < dense["decoder"] and pruned["vision"] == dense["vision"]


def millions(module):
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.fixture(scope="module")
def cogvla():
    """The published model, on the meta device."""
    with torch.device("meta"):
        return preset_policy("cogvla-7b", parity=True)


def test_cogvla_has_the_published_parts(cogvla):
    """Parameters as cogvla.md section 5 counts them; the last block of each encoder is not kept."""
    model = cogvla.model
    assert millions(model.decoder.routers) == pytest.approx(805.8, abs=0.5)
    assert millions(model.action_decoder) == pytest.approx(151.1, abs=0.1)
    assert millions(model.vision.projectors) == pytest.approx(42.5, abs=0.1)
    assert millions(model.vision.gate) == pytest.approx(16.8, abs=0.1)
    assert millions(model.state_projector) == pytest.approx(16.8, abs=0.1)
    film = sum(millions(block.film) for encoder in model.vision.encoders for block in encoder.blocks)
    last = 2 * 4097 * (1024 + 1152) / 1e6
    assert film + last == pytest.approx(456.3, abs=0.5)
    assert [len(encoder.blocks) for encoder in model.vision.encoders] == [23, 26]
    assert millions(model.decoder.backbone) == pytest.approx(
        6607, abs=2
    )  # Llama-2-7B without its output head
    assert sum(model.decoder.counts) / 32 == pytest.approx(68.5, abs=0.05)


def test_cogvla_computes_what_the_reference_computes(cogvla):
    """kernels.md section 2: 0.53 + 0.40 TFLOP of vision for two cameras, 2.12 for the routed decoder."""
    operations, tokens = count_operations(cogvla), count_tokens(cogvla)
    assert operations["vision"] / 1e12 == pytest.approx(0.93, rel=0.02)
    mean = tokens["in the decoder, mean of its layers"]
    assert mean == pytest.approx(TEXT_TOKENS + 1 + 57 + 68.5, abs=0.05)
    # The reference counts 163 tokens a layer: 35 of text and 1 of BOS where we count `TEXT_TOKENS`.
    assert operations["decoder"] / 1e12 == pytest.approx(2.12 * mean / 163, rel=0.02)


def test_the_middle_size_is_of_its_class():
    with torch.device("meta"):
        policy = preset_policy("mergevla-0.5b")
    assert millions(policy.model.decoder.backbone) == pytest.approx(494, abs=1)  # Qwen2.5-0.5B
    tokens = count_tokens(policy)
    assert tokens["patches in encoder 0"] == tokens["patches in encoder 1"] == 512
    assert tokens["vision tokens out of the encoders"] == 128


def test_counting_a_policy_leaves_it_alone_and_allocates_nothing():
    policy = preset_policy("nano")
    before = {name: value.data_ptr() for name, value in policy.state_dict().items()}
    assert count_operations(policy)["total"] > 0
    assert {name: value.data_ptr() for name, value in policy.state_dict().items()} == before
    assert not any(parameter.is_meta for parameter in policy.parameters())


@pytest.mark.parametrize(
    "preset", ["nano", "mergevla-0.5b", pytest.param("cogvla-7b", marks=pytest.mark.slow)]
)
def test_every_preset_is_inspected_from_the_command_line(preset, capsys):
    assert cli.run(["inspect", preset]) == 0
    shown = capsys.readouterr().out
    assert "parameters" in shown and "vision tokens out of the encoders" in shown and "floor" in shown


def test_the_floor_is_memory_or_compute():
    assert latency_floor(int(BANDWIDTH / 2), 1) == 1.0
    assert latency_floor(1, int(2 * PEAK)) == 2.0


def test_inspecting_a_preset_allocates_no_weights(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("vla.inspection._print_policy", lambda console, policy: seen.append(policy))
    assert cli.run(["inspect", "nano"]) == 0
    assert all(parameter.is_meta for parameter in seen[0].parameters())

"""`vla inspect`: counts against a hand-worked case, and nothing allocated for a preset."""

import torch

from vla import cli
from vla.inspection import BANDWIDTH, PEAK, TEXT_TOKENS, count_operations, latency_floor, preset_policy


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


def test_the_floor_is_memory_or_compute():
    assert latency_floor(int(BANDWIDTH / 2), 1) == 1.0
    assert latency_floor(1, int(2 * PEAK)) == 2.0


def test_inspecting_a_preset_allocates_no_weights(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("vla.inspection._print_policy", lambda console, policy: seen.append(policy))
    assert cli.run(["inspect", "nano"]) == 0
    assert all(parameter.is_meta for parameter in seen[0].parameters())

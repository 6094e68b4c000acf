"""The policy's forward through `vla.kernels`: its torch paths change no bit, its Triton paths no action."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from vla.evaluation.policy_source import SHIPPED_CHECKPOINT
from vla.kernels.attend import attend
from vla.kernels.launch import TRITON_INSTALLED
from vla.policy.checkpoint import load_checkpoint
from vla.policy.decoder import RoutedDecoder
from vla.policy.instruction import encode
from vla.policy.plain import is_plain
from vla.policy.residual_norm import residual_norm
from vla.policy.routing import masked_mean, select_top_k
from vla.policy.vision import VisionBlock

TEXTS = ["open it", "pick up the alphabet soup and place it in the basket"]


def plain_block(self, x, condition, rows=None):
    """A vision block in torch's own modules, equation by equation."""
    queries, keys = self._project(x, rows)
    k, v = (self._split(part) for part in keys.chunk(2, dim=-1))
    x = x[:, :rows] + self.out(attend(queries, k, v).transpose(1, 2).flatten(2))
    gamma, beta = self.film.out(condition)[:, None].chunk(2, dim=-1)
    x = x + gamma * x + beta
    return x + self.mlp(self.norm2(x))


def plain_decoder(self, x, layout, text_valid=None, trace=None, layers=None):
    """LFP-Routing in transformers' own layers and torch's gather and scatter, vision apart from the rest."""
    tail = text_valid.new_ones(len(x), layout.length - text_valid.shape[1])
    valid = torch.cat([text_valid, tail], dim=1)
    mask, text = layout.mask(self.mask, valid), layout.text
    rotary = self.backbone.rotary_emb(x, valid.long().cumsum(1) - 1)
    for index, layer in enumerate(self.backbone.layers):
        k = self.counts[index]
        if k == layout.vision:
            x = layer(x, attention_mask=mask, position_embeddings=rotary)
            continue
        normed = layer.input_layernorm(x[:, : text + layout.vision])
        u = masked_mean(normed[:, :text], valid[:, :text])
        logits, gates = self.routers[str(index)](normed[:, text:], u)
        kept = select_top_k(logits, k)
        position = torch.arange(layout.length).expand(len(x), -1)
        columns = layout.with_vision(position, kept + text)
        gate = layout.with_vision(torch.ones_like(x[:, :, 0]), gates.gather(1, kept))[..., None]
        chosen = x[:, text : text + layout.vision].gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        y = layout.with_vision(x, chosen)
        tables = [table.gather(1, columns[..., None].expand(-1, -1, table.shape[-1])) for table in rotary]
        small = mask.without(layout.vision - k, valid.gather(1, columns))
        h = layer.input_layernorm(y) * gate
        y = y + layer.self_attn(hidden_states=h, attention_mask=small, position_embeddings=tables)[0]
        y = y + gate * layer.mlp(layer.post_attention_layernorm(y))
        vision = x[:, text : text + layout.vision]
        vision = vision.scatter(1, kept[..., None].expand_as(chosen), y[:, text : text + k])
        x = torch.cat([y[:, :text], vision, y[:, text + k :]], dim=1)
    return self.backbone.norm(x)


def nano_batch(config, count: int) -> dict:
    generator = torch.Generator().manual_seed(count)
    tokens, valid = encode((TEXTS * count)[:count])
    size = config.image_size
    batch = {key: torch.rand(count, 3, size, size, generator=generator) for key in config.camera_keys}
    return batch | {
        "observation.state": torch.randn(count, 8, generator=generator),
        "observation.language.tokens": tokens,
        "observation.language.attention_mask": valid,
        "action": torch.rand(count, config.chunk_size, 7, generator=generator) * 2 - 1,
        "keyframe": torch.randn(count, 3, generator=generator) * 0.1,
    }


def test_the_shipped_policy_acts_and_learns_as_the_plain_formulation_bit_for_bit(monkeypatch):
    monkeypatch.setattr("vla.kernels.dispatch.FORCED", "torch")
    policy = load_checkpoint(SHIPPED_CHECKPOINT).policy
    batches = [nano_batch(policy.config, count) for count in (1, 3)]

    def run() -> tuple[list, list, dict]:
        actions = [policy.predict_action_chunk(batch) for batch in batches]
        losses = [policy(batches[1])[0]]
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(policy(batches[1])[0])
        named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(losses[0], [*named.values()], allow_unused=True)
        return actions, losses, {n: g for n, g in zip(named, gradients, strict=True) if g is not None}

    actions, losses, gradients = run()
    with monkeypatch.context() as patch:
        patch.setattr(VisionBlock, "forward", plain_block)
        patch.setattr(RoutedDecoder, "forward", plain_decoder)
        want_actions, want_losses, want_gradients = run()
    assert all(torch.equal(a, b) for a, b in zip(actions, want_actions, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(losses, want_losses, strict=True))
    assert gradients.keys() == want_gradients.keys()
    for name, gradient in gradients.items():  # the same products; one norm's sums run in two parts
        assert (gradient - want_gradients[name]).norm() <= 1e-6 * want_gradients[name].norm(), name


@pytest.fixture(scope="module")
def on_both_paths(tmp_path_factory) -> Callable[[str], dict]:
    """What `policy_on_kernels_worker.py` found on the torch and on the interpreted Triton path, by path."""
    if not TRITON_INSTALLED:
        pytest.skip("Triton is not installed")
    worker, found = Path(__file__).with_name("policy_on_kernels_worker.py"), {}
    for path in ("torch", "triton"):
        out = tmp_path_factory.mktemp(path) / "found.json"
        environment = {**os.environ, "COGMERGE_KERNELS": path, "TRITON_INTERPRET": "1"}
        done = subprocess.run(
            [sys.executable, "-P", worker, out], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[path] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("case", ["routed", "engine", "pretrained", "learning"])
def test_the_triton_paths_give_the_same_actions(case, on_both_paths):
    want, got = (torch.tensor(on_both_paths[path][case]["values"]) for path in ("torch", "triton"))
    assert want.std() > 0.01
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_in_bf16_they_differ_by_its_rounding(on_both_paths):
    exact = torch.tensor(on_both_paths["torch"]["pretrained"]["values"])
    want, got = (torch.tensor(on_both_paths[path]["narrow"]["values"]) for path in ("torch", "triton"))
    assert 0 < (got - want).norm() <= 0.03 * want.norm()
    assert (got - exact).norm() <= 2 * (want - exact).norm()


def test_every_wired_kernel_ran(on_both_paths):
    assert all(not found["ops"] for found in on_both_paths["torch"].values())
    ran = {case: found["ops"] for case, found in on_both_paths["triton"].items()}
    # 2 vision and 3 decoder blocks, of which 2 are routed.
    routed = {
        "add_film_norm": 5, "film_route_select": 2, "select_gather_norm": 2, "scatter_residual": 2,
        "coupled_attention": 3, "qkv_rope": 3, "gated_product": 3, "product_residual": 1,
    }  # fmt: skip
    assert ran["routed"] == routed
    assert set(ran["engine"]) == set(routed) - {"qkv_rope"}  # Qwen3 normalises between product and rotation
    assert set(ran["pretrained"]) == set(ran["narrow"]) == {*routed, "action_expert_block"}
    assert ran["pretrained"]["action_expert_block"] == 3
    assert set(ran["learning"]) == {*routed, "add_film_norm_backward"}


def test_a_module_that_must_be_called_is_not_read():
    norm = nn.LayerNorm(4)
    assert is_plain(norm, nn.LayerNorm) and not is_plain(norm, nn.RMSNorm)
    x, a = torch.randn(2, 1, 3, 4)
    h, y = residual_norm(x, a, norm)
    for spoil in (
        lambda: norm.register_forward_hook(lambda module, args, output: output + 1),
        lambda: norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    ):
        handle = spoil()
        assert not is_plain(norm, nn.LayerNorm)
        hooked = residual_norm(x, a, norm)
        torch.testing.assert_close(hooked[0], h)
        torch.testing.assert_close(hooked[1], norm(x + a))
        handle.remove()
    norm.forward = lambda x: x * 7  # as an expert bank does it
    torch.testing.assert_close(residual_norm(x, a, norm)[1], 7 * (x + a))
    del norm.forward
    torch.testing.assert_close(residual_norm(x, a, norm)[1], y)

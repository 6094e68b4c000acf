"""Pretrained decoders and encoders: the numbers of transformers, and a checkpoint that needs nothing else."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, SiglipVisionModel

from vla.contract import Camera, Interface, Vector
from vla.errors import UserError
from vla.policy.backbones import decoder_backbone
from vla.policy.checkpoint import load_checkpoint, save_checkpoint
from vla.policy.decoder import RoutedDecoder
from vla.policy.manifest import describe_build, make_contract
from vla.policy.masks import Layout
from vla.policy.modeling_cogmerge import CogMergePolicy
from vla.policy.pretrained import load_vision, resolve_vision
from vla.policy.pretrained_encoder import PretrainedEncoder
from vla.policy.processor_cogmerge import InstructionStep, make_cogmerge_pre_post_processors
from vla.policy.pruners.pruner import Budget

sys.path.insert(0, str(Path(__file__).parent))
from tiny_backbones import save_decoder, save_vision

FAMILIES = ("siglip", "siglip_vision_model", "dinov2", "dinov2_with_registers")
TEXTS = ["open it", "pick up the alphabet soup and place it in the basket"]
STATISTICS = {
    "observation.state": {"mean": torch.zeros(8), "std": torch.ones(8)},
    "action": {"min": -torch.ones(7), "max": torch.ones(7)},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("backbones")
    found = {family: save_vision(root / family, family) for family in FAMILIES}
    return found | {family: save_decoder(root / family, family) for family in ("llama", "qwen2", "qwen3")}


@pytest.fixture(scope="module")
def dual(folders, make_config):
    def build(**overrides):
        given = {
            "vision_backbones": [folders["dinov2_with_registers"], folders["siglip"]],
            "decoder_backbone": folders["llama"],
            "hidden_size": None,
            "intermediate_size": None,
            "decoder_layers": None,
            "decoder_heads": None,
            "decoder_kv_heads": None,
        }
        return make_config(**given | overrides)

    return build


def encode_batch(config, texts, make_batch):
    batch = make_batch(config, texts)
    step = InstructionStep(tokenizer=config.tokenizer, prompt=config.prompt)
    done = step({"observation": {}, "complementary_data": {"task": texts}})["observation"]
    return batch | done


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_dense_causal_decoder_is_the_transformers_model(folders, make_config, family):
    config = make_config(decoder_backbone=folders[family], hidden_size=None, intermediate_size=None,
                         decoder_layers=None, decoder_heads=None, decoder_kv_heads=None)  # fmt: skip
    assert (config.decoder, config.hidden_size, config.decoder_layers) == (family, 32, 4)
    decoder = RoutedDecoder(decoder_backbone(config, True), Budget((6,) * 4, (1, 2, 3)), mask="causal").eval()
    plain = AutoModel.from_pretrained(folders[family], attn_implementation="eager").eval()
    ids = torch.randint(0, 300, (2, 14))
    ours = decoder(decoder.embed(ids), Layout(text=5, vision=6, state=1, action=2))
    torch.testing.assert_close(ours, plain(ids).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [32, 56])
def test_a_vision_encoder_without_aggregation_is_the_transformers_model(folders, make_config, family, size):
    """All patches of the second-to-last block, at the pretraining size and at an interpolated one."""
    config = make_config(vision_backbones=[folders[family]], vision_reducer="none", image_size=size)
    encoder = PretrainedEncoder(config.vision_configs[0], config, 32, folders[family]).eval()
    images = torch.rand(2, 3, 3, size, size)
    ours = encoder(images, torch.randn(2, 32))
    plain = (SiglipVisionModel if "siglip" in family else AutoModel).from_pretrained(folders[family]).eval()
    half = "siglip" in family
    mean = torch.tensor([0.5] * 3 if half else [0.485, 0.456, 0.406]).reshape(3, 1, 1)
    std = torch.tensor([0.5] * 3 if half else [0.229, 0.224, 0.225]).reshape(3, 1, 1)
    pixels = (images.flatten(0, 1) - mean) / std
    known = {"interpolate_pos_encoding": True} if half else {}
    states = plain(pixel_values=pixels, output_hidden_states=True, **known).hidden_states
    patches = (size // 8) ** 2
    expected = states[-2][:, -patches:].reshape(2, 3 * patches, 24)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert (states[-2] - states[-1]).abs().max() > 0.01


def test_film_stands_between_attention_and_mlp_and_aggregation_tokens_see_all(folders, make_config):
    """Against the blocks composed by hand, for one image."""
    config = make_config(vision_backbones=[folders["siglip"]])
    encoder = PretrainedEncoder(config.vision_configs[0], config, 32, folders["siglip"]).eval()
    for block in encoder.blocks:
        torch.nn.init.normal_(block.film.out.weight, std=0.1)
    t, image = torch.randn(1, 32), torch.rand(1, 1, 3, 32, 32)
    model = load_vision(folders["siglip"], config.vision_configs[0]).vision_model
    x = torch.cat([model.embeddings((image[0] - 0.5) / 0.5), encoder.aggregation[None]], dim=1)
    for layer, block in zip(model.encoder.layers[:2], encoder.blocks, strict=True):
        h = layer.layer_norm1(x)
        q, k, v = (
            p(h).unflatten(-1, (2, 12)).transpose(1, 2)
            for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        attended = ((q @ k.mT / 12**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + layer.self_attn.out_proj(attended)
        gamma, beta = (block.film.out.weight @ t[0] + block.film.out.bias).chunk(2)
        x = (1 + gamma) * x + beta
        x = x + layer.mlp(layer.layer_norm2(x))
    torch.testing.assert_close(encoder(image, t), x[:, 16:], atol=1e-5, rtol=1e-5)


def test_an_encoder_that_does_not_divide_the_image_gets_it_resized(folders, make_config):
    config = make_config(vision_backbones=[folders["dinov2"]], image_size=36, stem_strides=[4])
    encoder = PretrainedEncoder(config.vision_configs[0], config, 32, folders["dinov2"]).eval()
    assert (encoder.grid, encoder.side) == (4, 32)
    assert encoder(torch.rand(1, 2, 3, 36, 36), torch.zeros(1, 32)).shape == (1, 2 * 4, 24)


def test_normalisation_is_the_one_of_the_encoders_folder(folders, tmp_path):
    shutil.copytree(folders["siglip"], tmp_path / "own")
    (tmp_path / "own/preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "image_processor_type": "x"})
    )
    assert resolve_vision(str(tmp_path / "own"))["image_mean"] == [0.1, 0.2, 0.3]
    assert resolve_vision(folders["siglip"])["image_std"] == [0.5, 0.5, 0.5]


def test_dual_encoders_and_decoder_run_for_any_batch(dual, make_batch):
    config = dual()
    torch.manual_seed(0)
    policy = CogMergePolicy(config).eval()
    with torch.no_grad():  # a FiLM that says something
        for name, parameter in policy.named_parameters():
            if "film.out" in name:
                parameter.normal_(std=0.1)
    together = encode_batch(config, TEXTS, make_batch)
    chunk, trace = policy.predict(together, trace := {}).actions, trace
    assert trace["patch_weights"].shape == (2, 2, 4, 4, 4)
    assert {layer: kept.shape for layer, kept in trace["kept"].items()} == {1: (2, 6), 2: (2, 4), 3: (2, 4)}
    for i, text in enumerate(TEXTS):
        alone = encode_batch(config, [text], make_batch)
        for key in (*config.camera_keys, "observation.state"):
            alone[key] = together[key][i : i + 1]
        torch.testing.assert_close(policy.predict(alone).actions, chunk[i : i + 1], atol=2e-5, rtol=1e-4)
    assert (chunk[0] - chunk[1]).abs().max() > 1e-4


def test_gradients_reach_routers_film_tokens_gate_and_backbones(dual, make_batch):
    config = dual(prompt="do: {instruction}")
    torch.manual_seed(0)
    policy = CogMergePolicy(config)
    for name, parameter in policy.named_parameters():
        if "film" in name:  # zero-initialised: identity FiLM passes no gradient to its condition
            torch.nn.init.normal_(parameter, std=0.02)
    batch = encode_batch(config, TEXTS, make_batch) | {"keyframe": torch.randn(2, 3)}
    policy(batch)[0].backward()
    silent = {
        name
        for name, p in policy.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    }
    # Softmax does not see a constant shift of all keys: a key bias has no gradient by mathematics.
    assert {name for name in silent if not name.endswith(("k_proj.bias", "key.bias"))} == set()


def test_a_learned_slot_per_coordinate_instead_of_one_per_step(dual, make_batch):
    """Outside parity too: 4 x 7 slots and the end, each learned, read where they stand."""
    config = dual(action_decoder="coordinate_l1")
    torch.manual_seed(0)
    policy = CogMergePolicy(config)
    assert policy.model.slots.shape == (4 * 7 + 1, 32)
    batch = encode_batch(config, TEXTS, make_batch) | {"keyframe": torch.randn(2, 3)}
    policy(batch)[0].backward()
    assert (policy.model.slots.grad.abs().sum(-1) > 0).all()
    assert policy.predict_action_chunk(batch).shape == (2, 4, 7)


def saved(policy, config, folder):
    interface = Interface(
        cameras=tuple(Camera(key, 64, 64) for key in config.camera_keys),
        state=Vector("observation.state", tuple(f"s{i}" for i in range(8))),
        action=Vector("action", tuple(f"a{i}" for i in range(7))),
        action_space="osc_pose_delta",
        control_rate=20.0,
    )
    pre, post = make_cogmerge_pre_post_processors(config, STATISTICS)
    contract = make_contract(config, interface, STATISTICS)
    return save_checkpoint(folder, policy, pre, post, contract, describe_build(policy))


def test_a_checkpoint_needs_nothing_but_itself(tmp_path, dual, monkeypatch):
    """Also when the folders that the backbones and the tokenizer came from are gone."""
    for name, config in (("a", dual()), ("b", dual())):
        for key in ("vision_backbones", "decoder_backbone"):
            value = getattr(config, key)
            copies = [shutil.copytree(f, tmp_path / name / Path(f).name, dirs_exist_ok=True)
                      for f in ([value] if isinstance(value, str) else value)]  # fmt: skip
            setattr(config, key, str(copies[0]) if isinstance(value, str) else [str(c) for c in copies])
        config.tokenizer = config.decoder_backbone
    policy = CogMergePolicy(config)
    saved(policy, config, tmp_path / "checkpoint")
    images = {key: np.full((64, 64, 3), 90, np.uint8) for key in config.camera_keys}
    before = load_checkpoint(tmp_path / "checkpoint").act(images, np.zeros(8), TEXTS[1])
    shutil.rmtree(tmp_path / "b")
    monkeypatch.setattr("vla.policy.instruction.cached_file", None)
    monkeypatch.setattr("vla.policy.pretrained.AutoConfig.from_pretrained", None)
    again = load_checkpoint(tmp_path / "checkpoint")
    assert np.array_equal(again.act(images, np.zeros(8), TEXTS[1]), before)
    # ... and what was loaded can be saved again, as a run that is resumed does.
    save_checkpoint(tmp_path / "second", again.policy, again.preprocessor, again.postprocessor,
                    again.contract, again.manifest)  # fmt: skip
    assert np.array_equal(load_checkpoint(tmp_path / "second").act(images, np.zeros(8), TEXTS[1]), before)


def test_a_new_policy_starts_from_the_backbones_weights(dual, folders):
    config = dual()
    policy, fresh = CogMergePolicy(config), CogMergePolicy(config, pretrained_backbones=False)
    plain = AutoModel.from_pretrained(folders["llama"])
    ours = policy.model.decoder.backbone.layers[2].mlp.up_proj.weight
    assert torch.equal(ours, plain.layers[2].mlp.up_proj.weight)
    assert not torch.equal(fresh.model.decoder.backbone.layers[2].mlp.up_proj.weight, ours)
    assert set(policy.state_dict()) == set(fresh.state_dict())


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"vision_backbones": ["/nowhere/encoder"]}, "'/nowhere/encoder' cannot be read"),
        ({"decoder_backbone": "{siglip}"}, "family 'siglip'; the policy runs llama, qwen2, qwen3"),
        ({"vision_backbones": ["{llama}"]}, "family 'llama'; the policy runs siglip_vision_model"),
        ({"vision_feature_layer": -4}, "between -3 and -1"),
        ({"prompt": "open it"}, "must contain '{instruction}'"),
        ({"vision_fusion": "cat"}, "Did you mean 'concat'|Known: gate, concat"),
    ],
)
def test_a_backbone_that_cannot_serve_is_refused(dual, folders, overrides, sentence):
    def named(value):
        for family in ("siglip", "llama"):
            if value == f"{{{family}}}":
                return folders[family]
        return value

    given = {
        key: [named(v) for v in value] if isinstance(value, list) else named(value)
        for key, value in overrides.items()
    }
    with pytest.raises(UserError, match=sentence):
        dual(**given)


def test_weights_of_another_size_are_refused(dual, folders, tmp_path):
    config = dual()
    config.decoder_backbone = save_decoder(tmp_path / "wider", "llama", intermediate_size=64)
    with pytest.raises(UserError, match="intermediate_size=64, the policy's configuration says 48"):
        CogMergePolicy(config)


def test_incomplete_weights_are_refused(dual, folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(folders["llama"], tmp_path / "part"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors \(layers.1.mlp.up_proj.weight"):
        CogMergePolicy(dual(decoder_backbone=str(folder)))


def test_a_smaller_vocabulary_is_padded(dual, folders):
    """OpenVLA pads Llama's vocabulary; the rows that exist keep their values."""
    config = dual()
    config.decoder_config = config.decoder_config | {"vocab_size": 320}
    embedding = decoder_backbone(config, True).embed_tokens.weight
    plain = AutoModel.from_pretrained(folders["llama"]).embed_tokens.weight
    assert embedding.shape == (320, 32) and torch.equal(embedding[:300], plain)


def test_a_tokenizer_of_another_model_is_refused(dual):
    config = dual(tokenizer="nano")
    config.decoder_config = config.decoder_config | {"vocab_size": 300}
    with pytest.raises(UserError, match="the decoder embeds 300; use the decoder's own tokenizer"):
        make_cogmerge_pre_post_processors(config, STATISTICS)


def test_concatenated_encoders_share_one_projector(dual, make_batch):
    config = dual(vision_fusion="concat")
    policy = CogMergePolicy(config).eval()
    vision, batch = policy.model.vision, encode_batch(config, TEXTS, make_batch)
    images = torch.stack([batch[key] for key in config.camera_keys], 1)
    t = torch.randn(2, 32)
    features = torch.cat([encoder(images, t) for encoder in vision.encoders], -1)
    torch.testing.assert_close(vision(images, t), vision.projectors[0](features))
    assert vision.gate is None and features.shape[-1] == 48

"""The released models in miniature: their state dicts, and what they compute, written from the description.

One sample at a time, tensors by their released names, no class of ours: `shared/reference/cogvla.md` sections
0 to 4 in plain torch, with OpenVLA-OFT as the variant that neither aggregates nor prunes nor masks.
"""

import math

import torch
import torch.nn.functional as F

HIDDEN, HEADS, LAYERS, INNER, VOCABULARY = 32, 2, 6, 40, 300
WIDTHS, BLOCKS, PATCH, GRID, REGISTERS, VIT_HEADS = (32, 48), (3, 4), 4, 4, 4, 16
TOKENS, CAMERAS, CHUNK, ACTION, STATE, STOP = 4, 2, 3, 7, 8, 2
MEANS = ([0.485, 0.456, 0.406], [0.5, 0.5, 0.5])
STDS = ([0.229, 0.224, 0.225], [0.5, 0.5, 0.5])
NAMES = ("featurizer", "fused_featurizer")


class Maker:
    """Random tensors by name."""

    def __init__(self, seed):
        self.generator, self.tensors = torch.Generator().manual_seed(seed), {}

    def add(self, name, *shape, std=0.3):
        self.tensors[name] = torch.randn(*shape, generator=self.generator) * std

    def linear(self, name, fan_in, fan_out, bias=True):
        self.add(f"{name}.weight", fan_out, fan_in, std=fan_in**-0.5)
        if bias:
            self.add(f"{name}.bias", fan_out, std=0.1)

    def norm(self, name, width):
        self.add(f"{name}.weight", width, std=0.2)
        self.tensors[f"{name}.weight"] += 1
        self.add(f"{name}.bias", width, std=0.1)


def openvla_tensors(seed=0, film=False, prefix="vision_backbone.", block=""):
    """OpenVLA's own: two timm encoders, three projector layers, Llama with its head."""
    make = Maker(seed)
    for name, width, blocks in zip(NAMES, WIDTHS, BLOCKS, strict=True):
        there = f"{prefix}{name}."
        make.add(f"{there}patch_embed.proj.weight", width, 3, PATCH, PATCH)
        make.add(f"{there}patch_embed.proj.bias", width)
        make.add(f"{there}pos_embed", 1, GRID**2, width)
        if name == NAMES[0]:
            make.add(f"{there}cls_token", 1, 1, width)
            make.add(f"{there}reg_token", 1, REGISTERS, width)
        for i in range(blocks):
            inner = f"{there}blocks.{i}.{block}"
            for norm in ("norm1", "norm2"):
                make.norm(inner + norm, width)
            make.linear(f"{inner}attn.qkv", width, 3 * width)
            make.linear(f"{inner}attn.proj", width, width)
            make.linear(f"{inner}mlp.fc1", width, 2 * width)
            make.linear(f"{inner}mlp.fc2", 2 * width, width)
            if name == NAMES[0]:
                for scale in ("ls1", "ls2"):
                    make.add(f"{inner}{scale}.scale_factor", width)
            if film:
                make.linear(f"{there}blocks.{i}.scale", HIDDEN, width)
                make.linear(f"{there}blocks.{i}.shift", HIDDEN, width)
        make.norm(f"{there}norm", width)
    make.add(f"{prefix}fused_featurizer.attn_pool.latent", 1, 1, WIDTHS[1])
    make.linear("projector.fc1", sum(WIDTHS), 4 * sum(WIDTHS))
    make.linear("projector.fc2", 4 * sum(WIDTHS), HIDDEN)
    make.linear("projector.fc3", HIDDEN, HIDDEN)
    llama(make)
    return make.tensors


def llama(make):
    there = "language_model.model."
    make.add(f"{there}embed_tokens.weight", VOCABULARY, HIDDEN, std=1.0)
    for i in range(LAYERS):
        layer = f"{there}layers.{i}."
        for part in "qkvo":
            make.linear(f"{layer}self_attn.{part}_proj", HIDDEN, HIDDEN, bias=False)
        make.linear(f"{layer}mlp.gate_proj", HIDDEN, INNER, bias=False)
        make.linear(f"{layer}mlp.up_proj", HIDDEN, INNER, bias=False)
        make.linear(f"{layer}mlp.down_proj", INNER, HIDDEN, bias=False)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            make.add(f"{layer}{norm}.weight", HIDDEN, std=0.2)
            make.tensors[f"{layer}{norm}.weight"] += 1
    make.tensors[f"{there}norm.weight"] = torch.ones(HIDDEN)
    make.linear("language_model.lm_head", HIDDEN, VOCABULARY, bias=False)


def heads_of(make):
    make.linear("proprio_projector.fc1", STATE, HIDDEN)
    make.linear("proprio_projector.fc2", HIDDEN, HIDDEN)
    make.norm("action_head.model.layer_norm1", HIDDEN * ACTION)
    make.linear("action_head.model.fc1", HIDDEN * ACTION, HIDDEN)
    for i in range(2):
        make.norm(f"action_head.model.mlp_resnet_blocks.{i}.ffn.0", HIDDEN)
        make.linear(f"action_head.model.mlp_resnet_blocks.{i}.ffn.1", HIDDEN, HIDDEN)
    make.norm("action_head.model.layer_norm2", HIDDEN)
    make.linear("action_head.model.fc2", HIDDEN, ACTION)


def oft_tensors(seed=0, film=False):
    """OpenVLA-OFT: OpenVLA, a proprio projector and a continuous head, with or without FiLM wrappers."""
    wrapped = {"prefix": "vision_backbone.vision_backbone.", "block": "block."} if film else {}
    make = Maker(seed + 1)
    heads_of(make)
    return openvla_tensors(seed, film, **wrapped) | make.tensors


def cogvla_tensors(seed=0):
    """CogVLA: FiLM, aggregation tokens, a projector per encoder, the fusion router and a router per layer."""
    make = Maker(seed + 2)
    heads_of(make)
    for name, width in zip(NAMES, WIDTHS, strict=True):
        make.add(f"vision_backbone.vision_aggr_{name}", 1, TOKENS, width, std=1.0)
        make.linear(f"{name}_proj.fc1", width, HIDDEN)
        make.linear(f"{name}_proj.fc2", HIDDEN, HIDDEN)
    make.linear("moe_router.router.0", HIDDEN, HIDDEN)
    make.linear("moe_router.router.2", HIDDEN, 2)
    for i in range(LAYERS):
        if ratio(i) <= 0.85:
            there = f"language_model.model.layers.{i}.router."
            make.linear(f"{there}router", HIDDEN, 2)
            for mlp in ("scale", "shift"):
                make.linear(f"{there}{mlp}.0", HIDDEN, HIDDEN // 2)
                make.linear(f"{there}{mlp}.2", HIDDEN // 2, HIDDEN)
    base = openvla_tensors(seed, True, "vision_backbone.vision_backbone.", "block.")
    return {k: v for k, v in base.items() if not k.startswith("projector.")} | make.tensors


def ratio(layer):
    return max(0.5 * math.cos(math.pi * layer / (LAYERS - 1)) + 0.5, 0.15)


class Released:
    """What a released model computes for one observation."""

    def __init__(self, tensors, gate="mlp"):
        self.w, self.gate = tensors, gate
        self.wrapped = any(".block." in name for name in tensors)
        self.film = any(name.endswith("blocks.0.scale.weight") for name in tensors)
        self.cogvla = "moe_router.router.0.weight" in tensors

    def actions(self, images, state, ids):
        """`images` (I, 3, H, W) in [0, 1], `state` (8,), `ids` with BOS: actions (K, D)."""
        embed = self.w["language_model.model.embed_tokens.weight"]
        text, stop = embed[torch.tensor(ids)], embed[STOP][None]
        t = torch.cat([text, stop]).mean(0)
        vision = torch.cat([self.vision(image, t) for image in images])
        proprio = self.linear("proprio_projector.fc2", F.gelu(self.linear("proprio_projector.fc1", state)))
        slots = torch.zeros(CHUNK * ACTION, HIDDEN)
        x = torch.cat([text[:1], vision, proprio[None], text[1:], slots, stop])
        kinds = ["v"] * (1 + len(vision)) + ["s"] + ["t"] * (len(ids) - 1) + ["a"] * (len(slots) + 1)
        x = self.decoder(x, kinds, len(vision))
        first = 1 + len(vision) + 1 + len(ids) - 1 - 1  # the last prompt token
        return self.head(x[first : first + CHUNK * ACTION])

    def vision(self, image, t):
        features = []
        for i, name in enumerate(NAMES):
            mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (MEANS[i], STDS[i]))
            features.append(self.encoder(i, name, (image - mean) / std, t))
        if not self.cogvla:
            x = torch.cat(features, -1)
            x = F.gelu(self.linear("projector.fc1", x))
            return self.linear("projector.fc3", F.gelu(self.linear("projector.fc2", x)))
        streams = [
            self.linear(f"{name}_proj.fc2", F.gelu(self.linear(f"{name}_proj.fc1", x)))
            for name, x in zip(NAMES, features, strict=True)
        ]
        mixture = self.linear("moe_router.router.2", F.gelu(self.linear("moe_router.router.0", t))).softmax(
            -1
        )
        return mixture[0] * streams[0] + mixture[1] * streams[1]

    def encoder(self, index, name, pixels, t):
        there = f"vision_backbone.{'vision_backbone.' if self.wrapped else ''}{name}."
        weight, bias = self.w[f"{there}patch_embed.proj.weight"], self.w[f"{there}patch_embed.proj.bias"]
        x = (
            F.conv2d(pixels[None], weight, bias, stride=PATCH)[0].flatten(1).T
            + self.w[f"{there}pos_embed"][0]
        )
        prefix = 0
        if index == 0:
            x = torch.cat([self.w[f"{there}cls_token"][0], self.w[f"{there}reg_token"][0], x])
            prefix = 1 + REGISTERS
        if self.cogvla:
            x = torch.cat([x, self.w[f"vision_backbone.vision_aggr_{name}"][0]])
        for i in range(BLOCKS[index] - 1):
            b = f"{there}blocks.{i}."
            inner = b + ("block." if self.wrapped else "")
            q, k, v = (
                part.unflatten(-1, (VIT_HEADS, -1)).transpose(0, 1)
                for part in self.linear(f"{inner}attn.qkv", self.norm(f"{inner}norm1", x)).chunk(3, -1)
            )
            a = ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)
            x = x + self.linear(f"{inner}attn.proj", a) * self.w.get(f"{inner}ls1.scale_factor", 1)
            if self.film:
                x = (1 + self.linear(f"{b}scale", t)) * x + self.linear(f"{b}shift", t)
            h = F.gelu(self.linear(f"{inner}mlp.fc1", self.norm(f"{inner}norm2", x)))
            x = x + self.linear(f"{inner}mlp.fc2", h) * self.w.get(f"{inner}ls2.scale_factor", 1)
        return x[prefix + GRID**2 :] if self.cogvla else x[prefix:]

    def decoder(self, x, kinds, vision):
        for i in range(LAYERS):
            if self.cogvla and ratio(i) <= 0.85:
                x = self.routed(i, x, kinds, vision)
            else:
                x = self.layer(i, x, self.mask(kinds), torch.ones(len(x), 1))
        return self.rms("language_model.model.norm", x)

    def routed(self, i, x, kinds, vision):
        there = f"language_model.model.layers.{i}.router."
        h = self.rms(f"language_model.model.layers.{i}.input_layernorm", x)
        u = h[1 + vision : kinds.index("a")].mean(0)
        gamma, beta = (
            self.linear(f"{there}{mlp}.2", F.gelu(self.linear(f"{there}{mlp}.0", u)))
            for mlp in ("scale", "shift")
        )
        filmed = (1 + gamma) * h[1 : 1 + vision] + beta
        p = self.linear(f"{there}router", torch.cat([h[:1], filmed, h[1 + vision :]])).softmax(-1)[:, 1]
        score = p.clone()
        score[0] = score[1 + vision :] = math.inf
        kept = score.topk(len(x) - vision + math.floor(vision * ratio(i))).indices.sort().values
        y = self.layer(i, x[kept], self.mask([kinds[j] for j in kept]), p[kept, None])
        return x.index_copy(0, kept, y)

    def layer(self, i, x, mask, gate):
        there = f"language_model.model.layers.{i}."
        h = self.rms(f"{there}input_layernorm", x)
        q, k, v = (
            (h @ self.w[f"{there}self_attn.{part}_proj.weight"].T).unflatten(-1, (HEADS, -1)).transpose(0, 1)
            for part in "qkv"
        )
        width = HIDDEN // HEADS
        angle = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
        cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))

        def rotate(z):
            return z * cos + torch.cat([-z[..., width // 2 :], z[..., : width // 2]], -1) * sin

        scores = (rotate(q) @ rotate(k).mT / width**0.5).masked_fill(~mask, -math.inf)
        a = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        y = x + a @ self.w[f"{there}self_attn.o_proj.weight"].T
        h = self.rms(f"{there}post_attention_layernorm", y)
        up = F.silu(h @ self.w[f"{there}mlp.gate_proj.weight"].T) * (
            h @ self.w[f"{there}mlp.up_proj.weight"].T
        )
        mlp = up @ self.w[f"{there}mlp.down_proj.weight"].T
        return y + gate * mlp if self.gate == "mlp" else x + gate * (y + mlp - x)

    def mask(self, kinds):
        """Section 3's table, rows are queries; OpenVLA-OFT is bidirectional."""
        n = len(kinds)
        if not self.cogvla:
            return torch.ones(n, n, dtype=torch.bool)
        before = {"v": "v", "s": "vs", "t": "vst", "a": "vsta"}
        return torch.tensor(
            [
                [
                    kinds[key] in before[kinds[query]]
                    and (kinds[query] == "a" or kinds[key] != kinds[query] or key <= query)
                    for key in range(n)
                ]
                for query in range(n)
            ]
        )

    def head(self, states):
        x = self.norm("action_head.model.layer_norm1", states.reshape(CHUNK, -1))
        x = F.relu(self.linear("action_head.model.fc1", x))
        for i in range(2):
            block = f"action_head.model.mlp_resnet_blocks.{i}.ffn"
            x = x + F.relu(self.linear(f"{block}.1", self.norm(f"{block}.0", x)))
        return self.linear("action_head.model.fc2", self.norm("action_head.model.layer_norm2", x))

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def norm(self, name, x):
        eps = 1e-6 if name.startswith("vision") else 1e-5
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def rms(self, name, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[f"{name}.weight"]

"""Networks as other libraries name and compute them, as small as they go: what the shipped rule sets begin with. They need torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FairseqRoberta", "MetaLlama", "OpenAIClip", "ResNet", "TimmViT", "TorchvisionViT", "with_linear_layers"]


class ResNet(nn.Module):
    """torchvision's (and timm's): the stride of a bottleneck is in its 3x3 convolution."""

    def __init__(self, kind: str, *, depths: list[int], width: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        given = width
        for number, depth in enumerate(depths):
            made = width * 2**number * (4 if kind == "bottleneck" else 1)
            strides = [2 if number else 1] + [1] * (depth - 1)
            blocks = [ResNetBlock(kind, given if not at else made, made, stride) for at, stride in enumerate(strides)]
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
            given = made
        self.stages = len(depths)
        self.fc = nn.Linear(given, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for number in range(self.stages):
            x = getattr(self, f"layer{number + 1}")(x)
        return self.fc(x.mean((2, 3)))


class ResNetBlock(nn.Module):
    def __init__(self, kind: str, given: int, made: int, stride: int) -> None:
        super().__init__()
        inner = made // 4
        basic = [(given, made, 3, stride), (made, made, 3, 1)]
        bottleneck = [(given, inner, 1, 1), (inner, inner, 3, stride), (inner, made, 1, 1)]
        self.steps = basic if kind == "basic" else bottleneck
        for number, (n_in, n_out, size, step) in enumerate(self.steps, 1):
            setattr(self, f"conv{number}", nn.Conv2d(n_in, n_out, size, step, size // 2, bias=False))
            setattr(self, f"bn{number}", nn.BatchNorm2d(n_out))
        if stride > 1 or given != made:
            self.downsample = nn.Sequential(nn.Conv2d(given, made, 1, stride, bias=False), nn.BatchNorm2d(made))

    def forward(self, x: Tensor) -> Tensor:
        made = x
        for number in range(1, len(self.steps) + 1):
            made = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(made))
            made = F.relu(made) if number < len(self.steps) else made
        return F.relu(made + (self.downsample(x) if hasattr(self, "downsample") else x))


def parts(**modules: nn.Module) -> Any:
    """A module that only holds others."""
    made = nn.Module()
    for name, module in modules.items():
        made.add_module(name, module)
    return made


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int, *, causal: bool = False) -> Tensor:
    """Attention over (batch, length, width)."""
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*split, is_causal=causal).transpose(1, 2).flatten(2)


def fused(attention: nn.MultiheadAttention, x: Tensor, *, causal: bool = False) -> Tensor:
    """What torch's attention gives for itself."""
    length = x.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1) if causal else None
    return attention(x, x, x, need_weights=False, attn_mask=mask)[0]


class TorchvisionViT(nn.Module):
    def __init__(self, *, width: int, heads: int, depth: int, outputs: int) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.conv_proj = nn.Conv2d(3, width, 8, 8)
        layers = nn.ModuleDict({f"encoder_layer_{n}": self.block(width, heads) for n in range(depth)})
        self.encoder = parts(layers=layers, ln=nn.LayerNorm(width, eps=1e-6))
        self.encoder.pos_embedding = nn.Parameter(torch.zeros(1, 17, width))
        self.heads = nn.Sequential()
        self.heads.add_module("head", nn.Linear(width, outputs))

    def block(self, width: int, heads: int) -> Any:
        inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0), nn.Linear(2 * width, width))
        attention = nn.MultiheadAttention(width, heads, batch_first=True)
        norms = {f"ln_{n}": nn.LayerNorm(width, eps=1e-6) for n in (1, 2)}
        return parts(self_attention=attention, mlp=inner, **norms)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.encoder.pos_embedding
        for block in self.encoder.layers.values():
            x = x + fused(block.self_attention, block.ln_1(x))
            x = x + block.mlp(block.ln_2(x))
        return self.heads(self.encoder.ln(x)[:, 0])


class TimmViT(nn.Module):
    def __init__(self, *, width: int, heads: int, depth: int, outputs: int) -> None:
        super().__init__()
        self.count = heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, width))
        self.patch_embed = parts(proj=nn.Conv2d(3, width, 8, 8))
        self.blocks = nn.ModuleList([self.block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, outputs)

    def block(self, width: int) -> Any:
        attention = parts(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width))
        inner = parts(fc1=nn.Linear(width, 2 * width), fc2=nn.Linear(2 * width, width))
        return parts(attn=attention, mlp=inner, **{f"norm{n}": nn.LayerNorm(width, eps=1e-6) for n in (1, 2)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = x + block.attn.proj(attended(*block.attn.qkv(block.norm1(x)).chunk(3, -1), self.count))
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        return self.head(self.norm(x)[:, 0])


def with_linear_layers(model: Any) -> Any:
    """GPT-2 of transformers with a Linear in place of every Conv1D."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "Conv1D":
                setattr(module, name, nn.Linear(*child.weight.shape))
    return model


class MetaLlama(nn.Module):
    """Meta's: rotary embeddings turn pairs of neighbours, as complex numbers."""

    def __init__(self, *, width: int, inner: int, heads: int, kv_heads: int, depth: int, vocabulary: int) -> None:
        super().__init__()
        self.count, self.kv_count, self.head_dim = heads, kv_heads, width // heads
        kept = kv_heads * self.head_dim
        self.tok_embeddings = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([self.block(width, inner, kept) for _ in range(depth)])
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.output = nn.Linear(width, vocabulary, bias=False)

    def block(self, width: int, inner: int, kept: int) -> Any:
        sizes = {"wq": (width, width), "wk": (width, kept), "wv": (width, kept), "wo": (width, width)}
        attention = parts(**{name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        sizes = {"w1": (width, inner), "w2": (inner, width), "w3": (width, inner)}
        forward = parts(**{name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        norms = {name: nn.RMSNorm(width, eps=1e-5) for name in ("attention_norm", "ffn_norm")}
        return parts(attention=attention, feed_forward=forward, **norms)

    def turned(self, x: Tensor) -> Tensor:
        """(batch, length, rows) with the pairs of each head turned by their place."""
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, self.head_dim // 2, 2)).contiguous())
        frequencies = 10000.0 ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = torch.outer(torch.arange(x.shape[1]).float(), frequencies)
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(pairs * turns).flatten(2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for block in self.layers:
            given, one = block.attention_norm(x), block.attention
            q, k = self.turned(one.wq(given)), self.turned(one.wk(given))
            k, v = (self.repeated(each) for each in (k, one.wv(given)))
            x = x + one.wo(attended(q, k, v, self.count, causal=True))
            given, two = block.ffn_norm(x), block.feed_forward
            x = x + two.w2(F.silu(two.w1(given)) * two.w3(given))
        return self.output(self.norm(x))

    def repeated(self, x: Tensor) -> Tensor:
        """Keys or values, each head for all the queries that share it."""
        return x.unflatten(-1, (self.kv_count, -1)).repeat_interleave(self.count // self.kv_count, 2).flatten(2)


class OpenAIClip(nn.Module):
    def __init__(self, *, width: int, heads: int, depth: int, outputs: int, vocabulary: int, context: int) -> None:
        super().__init__()
        self.visual = parts(
            conv1=nn.Conv2d(3, width, 8, 8, bias=False),
            ln_pre=nn.LayerNorm(width),
            transformer=self.tower(width, heads, depth),
            ln_post=nn.LayerNorm(width),
        )
        self.visual.class_embedding = nn.Parameter(torch.zeros(width))
        self.visual.positional_embedding = nn.Parameter(torch.zeros(17, width))
        self.visual.proj = nn.Parameter(torch.zeros(width, outputs))
        self.transformer = self.tower(width, heads, depth)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(context, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, outputs))
        self.logit_scale = nn.Parameter(torch.ones([]))

    def tower(self, width: int, heads: int, depth: int) -> Any:
        blocks = [
            parts(
                attn=nn.MultiheadAttention(width, heads, batch_first=True),
                ln_1=nn.LayerNorm(width),
                mlp=parts(c_fc=nn.Linear(width, 4 * width), c_proj=nn.Linear(4 * width, width)),
                ln_2=nn.LayerNorm(width),
            )
            for _ in range(depth)
        ]
        return parts(resblocks=nn.ModuleList(blocks))

    def through(self, tower: Any, x: Tensor, *, causal: bool = False) -> Tensor:
        for block in tower.resblocks:
            x = x + fused(block.attn, block.ln_1(x), causal=causal)
            inner = block.mlp.c_fc(block.ln_2(x))
            x = x + block.mlp.c_proj(inner * torch.sigmoid(1.702 * inner))
        return x

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        v = self.visual
        x = v.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        x = v.ln_post(self.through(v.transformer, v.ln_pre(x))[:, 0]) @ v.proj
        t = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        t = self.ln_final(self.through(self.transformer, t, causal=True))
        t = t[torch.arange(len(t)), tokens.argmax(-1)] @ self.text_projection
        return self.logit_scale.exp() * F.normalize(x, dim=-1) @ F.normalize(t, dim=-1).T


class FairseqRoberta(nn.Module):
    """fairseq's. ``age``: ``new``, ``old`` (its encoder is called a decoder) or ``oldest`` (queries, keys and values in one tensor)."""

    def __init__(
        self, *, width: int, inner: int, heads: int, depth: int, vocabulary: int, positions: int, age: str
    ) -> None:
        super().__init__()
        self.count, self.is_fused, self.name = heads, age == "oldest", "encoder" if age == "new" else "decoder"
        self.norm_name = "layernorm_embedding" if age == "new" else "emb_layer_norm"
        tokens = nn.Embedding(vocabulary, width)
        sentences = parts(
            embed_tokens=tokens,
            embed_positions=nn.Embedding(positions, width),
            layers=nn.ModuleList([self.block(width, inner) for _ in range(depth)]),
            **{self.norm_name: nn.LayerNorm(width)},
        )
        head = parts(dense=nn.Linear(width, width), layer_norm=nn.LayerNorm(width))
        head.weight = tokens.weight
        head.bias = nn.Parameter(torch.zeros(vocabulary))
        self.add_module(self.name, parts(sentence_encoder=sentences, lm_head=head))

    def block(self, width: int, inner: int) -> Any:
        attention = parts(out_proj=nn.Linear(width, width))
        if self.is_fused:
            attention.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
            attention.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        else:
            for name in "qkv":
                attention.add_module(f"{name}_proj", nn.Linear(width, width))
        norms = {name: nn.LayerNorm(width) for name in ("self_attn_layer_norm", "final_layer_norm")}
        return parts(self_attn=attention, fc1=nn.Linear(width, inner), fc2=nn.Linear(inner, width), **norms)

    def forward(self, tokens: Tensor) -> Tensor:
        one = getattr(self, self.name)
        sentences, head = one.sentence_encoder, one.lm_head
        places = torch.arange(tokens.shape[1]) + 2
        x = getattr(sentences, self.norm_name)(sentences.embed_tokens(tokens) + sentences.embed_positions(places))
        for block in sentences.layers:
            own = block.self_attn
            if self.is_fused:
                qkv = F.linear(x, own.in_proj_weight, own.in_proj_bias).chunk(3, -1)
            else:
                qkv = (own.q_proj(x), own.k_proj(x), own.v_proj(x))
            x = block.self_attn_layer_norm(x + own.out_proj(attended(*qkv, self.count)))
            x = block.final_layer_norm(x + block.fc2(F.gelu(block.fc1(x))))
        return F.linear(head.layer_norm(F.gelu(head.dense(x))), head.weight, head.bias)

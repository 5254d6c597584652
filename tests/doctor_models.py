"""Small models with the names and layouts of well-known libraries, for tests of the doctor. All of them run."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
nn: Any = torch.nn


def trained(module: Any, seed: int = 0) -> Any:
    """The module with random numbers in every float tensor, norms and statistics too, and set to evaluation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict(keep_vars=True).items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if value.dim() > 1:
                value.copy_(noise / math.sqrt(value[0].numel()))
            else:
                value.copy_(
                    noise.abs() + 0.5
                    if name.endswith("var")
                    else 1 + 0.2 * noise
                    if "norm" in name or "bn" in name
                    else noise
                )
    return module.eval()


# -------------------------------------------------------------------- convolutions


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        stride = 1 if inputs == width else 2
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        if stride == 2:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, 2, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Any) -> Any:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class ResNet(nn.Module):
    """As torchvision names it."""

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        self.layer2 = nn.Sequential(BasicBlock(8, 16), BasicBlock(16, 16))
        self.layer3 = nn.Sequential(BasicBlock(16, 32), BasicBlock(32, 32))
        self.fc = nn.Linear(32, classes)

    def forward(self, x: Any) -> Any:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


# -------------------------------------------------------------------- transformers


class BertLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.self = nn.Module()
        for name in ("query", "key", "value"):
            self.attention.self.add_module(name, nn.Linear(width, width))
        self.attention.output = nn.Module()
        self.attention.output.dense = nn.Linear(width, width)
        self.attention.output.LayerNorm = nn.LayerNorm(width)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(width, 4 * width)
        self.output = nn.Module()
        self.output.dense = nn.Linear(4 * width, width)
        self.output.LayerNorm = nn.LayerNorm(width)

    def forward(self, x: Any) -> Any:
        own = self.attention.self
        y = (own.query(x) @ own.key(x).transpose(-1, -2)).softmax(-1) @ own.value(x)
        x = self.attention.output.LayerNorm(x + self.attention.output.dense(y))
        return self.output.LayerNorm(x + self.output.dense(self.intermediate.dense(x).relu()))


class Bert(nn.Module):
    """As transformers names it, without a head."""

    def __init__(self, vocabulary: int = 50, width: int = 16, layers: int = 3) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(vocabulary, width)
        self.embeddings.position_embeddings = nn.Embedding(12, width)
        self.embeddings.LayerNorm = nn.LayerNorm(width)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList([BertLayer(width) for _ in range(layers)])
        self.pooler = nn.Module()
        self.pooler.dense = nn.Linear(width, width)

    def forward(self, ids: Any) -> Any:
        places = torch.arange(ids.shape[1])
        x = self.embeddings.LayerNorm(
            self.embeddings.word_embeddings(ids) + self.embeddings.position_embeddings(places)
        )
        for layer in self.encoder.layer:
            x = layer(x)
        return self.pooler.dense(x[:, 0]).tanh()


class BertClassifier(nn.Module):
    """The same with a head."""

    def __init__(self, labels: int = 2) -> None:
        super().__init__()
        self.bert = Bert()
        self.classifier = nn.Linear(16, labels)

    def forward(self, ids: Any) -> Any:
        return self.classifier(self.bert(ids))


class Conv1D(nn.Module):
    """The linear layer of GPT-2: its weight is the transposed one."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Any) -> Any:
        return x @ self.weight + self.bias


class GPTBlock(nn.Module):
    def __init__(self, width: int, linear: Any) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.Module()
        self.attn.c_attn = linear(3 * width, width)
        self.attn.c_proj = linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Module()
        self.mlp.c_fc = linear(4 * width, width)
        self.mlp.c_proj = linear(width, 4 * width)

    def forward(self, x: Any) -> Any:
        q, k, v = self.attn.c_attn(self.ln_1(x)).chunk(3, -1)
        x = x + self.attn.c_proj((q @ k.transpose(-1, -2)).softmax(-1) @ v)
        return x + self.mlp.c_proj(self.mlp.c_fc(self.ln_2(x)).relu())


class GPT(nn.Module):
    """GPT-2 as transformers names it, with its ``Conv1D`` or with ``nn.Linear``."""

    def __init__(self, *, conv1d: bool, vocabulary: int = 50, positions: int = 32) -> None:
        super().__init__()
        linear = Conv1D if conv1d else lambda outputs, inputs: nn.Linear(inputs, outputs)
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(vocabulary, 16)
        self.transformer.wpe = nn.Embedding(positions, 16)
        self.transformer.h = nn.ModuleList([GPTBlock(16, linear) for _ in range(3)])
        self.transformer.ln_f = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, vocabulary, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, ids: Any) -> Any:
        x = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


class LlamaBlock(nn.Module):
    """A decoder block with rotary embeddings. ``meta``: Meta's names, rows of a head in pairs; else those of transformers, in halves."""

    def __init__(self, *, meta: bool, width: int = 32, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.meta, self.heads, self.groups = meta, heads, groups
        size = width // heads
        shapes = {"q": (width, width), "k": (groups * size, width), "v": (groups * size, width), "o": (width, width)}
        attention, mlp = nn.Module(), nn.Module()
        for name, (rows, columns) in shapes.items():
            attention.add_module(f"w{name}" if meta else f"{name}_proj", nn.Linear(columns, rows, bias=False))
        for name, other, (rows, columns) in (
            ("w1", "gate_proj", (48, width)),
            ("w2", "down_proj", (width, 48)),
            ("w3", "up_proj", (48, width)),
        ):
            mlp.add_module(name if meta else other, nn.Linear(columns, rows, bias=False))
        if meta:
            self.attention, self.feed_forward = attention, mlp
            self.attention_norm, self.ffn_norm = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)
        else:
            self.self_attn, self.mlp = attention, mlp
            self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)

    def _rotated(self, x: Any) -> Any:
        length, size = x.shape[-2:]
        angles = torch.arange(length)[:, None] / 100 ** (torch.arange(size // 2) * 2 / size)
        one, other = (x[..., 0::2], x[..., 1::2]) if self.meta else x.chunk(2, -1)
        turned = one * angles.cos() - other * angles.sin(), one * angles.sin() + other * angles.cos()
        return torch.stack(turned, -1).flatten(-2) if self.meta else torch.cat(turned, -1)

    def forward(self, x: Any) -> Any:
        attention, mlp = (self.attention, self.feed_forward) if self.meta else (self.self_attn, self.mlp)
        norms = (
            (self.attention_norm, self.ffn_norm) if self.meta else (self.input_layernorm, self.post_attention_layernorm)
        )
        q, k, v, o = attention.children()
        gate, down, up = mlp.children()
        y = norms[0](x)
        counts = (q, self.heads), (k, self.groups), (v, self.groups)
        query, key, value = (each(y).unflatten(-1, (count, -1)).transpose(1, 2) for each, count in counts)
        query, key = self._rotated(query), self._rotated(key).repeat_interleave(self.heads // self.groups, 1)
        scores = (query @ key.transpose(-1, -2) / 3).softmax(-1)
        x = x + o((scores @ value.repeat_interleave(self.heads // self.groups, 1)).transpose(1, 2).flatten(2))
        y = norms[1](x)
        return x + down(nn.functional.silu(gate(y)) * up(y))


class Llama(nn.Module):
    """Llama with Meta's names or with those of transformers."""

    def __init__(self, *, meta: bool, layers: int = 3) -> None:
        super().__init__()
        self.meta = meta
        embed, norm, head = nn.Embedding(60, 32), nn.RMSNorm(32, 1e-6), nn.Linear(32, 60, bias=False)
        blocks = nn.ModuleList([LlamaBlock(meta=meta) for _ in range(layers)])
        if meta:
            self.tok_embeddings, self.layers, self.norm, self.output = embed, blocks, norm, head
        else:
            self.model = nn.Module()
            self.model.embed_tokens, self.model.layers, self.model.norm = embed, blocks, norm
            self.lm_head = head

    def forward(self, ids: Any) -> Any:
        own = self if self.meta else self.model
        x = (self.tok_embeddings if self.meta else self.model.embed_tokens)(ids)
        for block in own.layers:
            x = block(x)
        return (self.output if self.meta else self.lm_head)(own.norm(x))


class VitBlock(nn.Module):
    """A block of a vision transformer; ``fused``: as timm names it, else as transformers does."""

    def __init__(self, width: int, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attn, self.mlp = nn.Module(), nn.Module()
            self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            return
        self.attention, self.intermediate, self.output = nn.Module(), nn.Module(), nn.Module()
        self.attention.attention, self.attention.output = nn.Module(), nn.Module()
        for name in ("query", "key", "value"):
            self.attention.attention.add_module(name, nn.Linear(width, width))
        self.attention.output.dense = nn.Linear(width, width)
        self.intermediate.dense, self.output.dense = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Any) -> Any:
        if self.fused:
            q, k, v = self.attn.qkv(self.norm1(x)).chunk(3, -1)
            out, second, up, down = self.attn.proj, self.norm2, self.mlp.fc1, self.mlp.fc2
        else:
            y = self.layernorm_before(x)
            q, k, v = (each(y) for each in self.attention.attention.children())
            out, second = self.attention.output.dense, self.layernorm_after
            up, down = self.intermediate.dense, self.output.dense
        x = x + out((q @ k.transpose(-1, -2)).softmax(-1) @ v)
        return x + down(up(second(x)).relu())


class Vit(nn.Module):
    """A vision transformer with the names of timm or of transformers."""

    def __init__(self, *, fused: bool, tokens: int = 17) -> None:
        super().__init__()
        self.fused = fused
        blocks = nn.ModuleList([VitBlock(16, fused=fused) for _ in range(3)])
        cls, pos = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.zeros(1, tokens, 16))
        patch, norm, head = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), nn.Linear(16, 5)
        if fused:
            self.cls_token, self.pos_embed = cls, pos
            self.patch_embed = nn.Module()
            self.patch_embed.proj, self.blocks, self.norm, self.head = patch, blocks, norm, head
            return
        self.vit = nn.Module()
        self.vit.embeddings = nn.Module()
        self.vit.embeddings.cls_token, self.vit.embeddings.position_embeddings = cls, pos
        self.vit.embeddings.patch_embeddings = nn.Module()
        self.vit.embeddings.patch_embeddings.projection = patch
        self.vit.encoder = nn.Module()
        self.vit.encoder.layer = blocks
        self.vit.layernorm, self.classifier = norm, head

    def forward(self, image: Any) -> Any:
        own = self if self.fused else self.vit.embeddings
        patch = self.patch_embed.proj if self.fused else own.patch_embeddings.projection
        x = patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([own.cls_token.expand(len(x), -1, -1), x], 1) + (
            own.pos_embed if self.fused else own.position_embeddings
        )
        for block in self.blocks if self.fused else self.vit.encoder.layer:
            x = block(x)
        norm, head = (self.norm, self.head) if self.fused else (self.vit.layernorm, self.classifier)
        return head(norm(x)[:, 0])


# -------------------------------------------------------------------- experts


class Experts(nn.Module):
    """A block of experts, as a list with three matrices each, or stacked as two."""

    def __init__(self, *, stacked: bool, count: int = 12, width: int = 8, inner: int = 6) -> None:
        super().__init__()
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.Module()
        if stacked:
            self.experts.gate_up_proj = nn.Parameter(torch.randn(count, 2 * inner, width))
            self.experts.down_proj = nn.Parameter(torch.randn(count, width, inner))
        else:
            for number in range(count):
                expert = nn.Module()
                expert.gate_proj, expert.up_proj = (
                    nn.Linear(width, inner, bias=False),
                    nn.Linear(width, inner, bias=False),
                )
                expert.down_proj = nn.Linear(inner, width, bias=False)
                self.experts.add_module(str(number), expert)


class Mixture(nn.Module):
    """A stack of such blocks with norms and attention."""

    def __init__(self, *, stacked: bool, layers: int = 3, count: int = 12) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(20, 8)
        self.model.layers = nn.ModuleList()
        for _ in range(layers):
            layer = nn.Module()
            layer.self_attn = nn.Module()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                layer.self_attn.add_module(name, nn.Linear(8, 8, bias=False))
            layer.mlp = Experts(stacked=stacked, count=count)
            layer.input_layernorm, layer.post_attention_layernorm = nn.LayerNorm(8), nn.LayerNorm(8)
            self.model.layers.append(layer)
        self.model.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 20, bias=False)

"""Small reference models that no package on hand offers, written from the published architectures, with their published key names.

Each factory at the end gives a model in float64, so that a conversion can be held to what rounding alone may change.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads·D) -> (B, heads, T, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v of (B, heads, T, D), as (B, T, heads·D)."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        length = q.shape[-2]
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)


# --- GPT-2 with linear layers (nanoGPT's names)


class GPTAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.c_attn(x).chunk(3, -1))
        return self.c_proj(attend(q, k, v, causal=True))


class GPTFeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = GPTAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = GPTFeedForward(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """The head is tied to the token embedding."""

    def __init__(self, vocab: int, length: int, width: int, heads: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "wpe": nn.Embedding(length, width),
                "h": nn.ModuleList(GPTBlock(width, heads, hidden) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens: Tensor, times: int = 1) -> Tensor:
        """Logits; with `times`, every block is run so many times in a row."""
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](torch.arange(tokens.shape[1]))
        for block in self.transformer["h"]:
            for _ in range(times):
                x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


# --- ViT with a fused qkv (timm's names)


class FusedAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        return self.proj(attend(q, k, v))


class ViTFeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = FusedAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = ViTFeedForward(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class TimmViT(nn.Module):
    def __init__(self, image: int, patch: int, width: int, heads: int, depth: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image // patch) ** 2, width))
        self.patch_embed = PatchEmbed(width, patch)
        self.blocks = nn.Sequential(*(ViTBlock(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


# --- BERT whose encoder is torch's own


class BertEmbeddings(nn.Module):
    def __init__(self, vocab: int, length: int, width: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab, width)
        self.position_embeddings = nn.Embedding(length, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, tokens: Tensor, types: Tensor) -> Tensor:
        positions = self.position_embeddings(torch.arange(tokens.shape[1]))
        return self.LayerNorm(self.word_embeddings(tokens) + positions + self.token_type_embeddings(types))


class TorchBert(nn.Module):
    def __init__(self, vocab: int, length: int, width: int, heads: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(vocab, length, width)
        layer = nn.TransformerEncoderLayer(width, heads, hidden, 0.0, "gelu", 1e-12, batch_first=True, norm_first=False)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, tokens: Tensor, types: Tensor, mask: Tensor) -> Tensor:
        """Hidden states; `mask` is 1 for a token and 0 for padding."""
        return self.encoder(self.embeddings(tokens, types), src_key_padding_mask=mask == 0)


# --- Llama: Meta's layout, and Mixtral with its experts one by one (transformers 4's names)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def angles(length: int, size: int, base: float = 10000.0) -> Tensor:
    """The angle of each position and pair, (T, D/2)."""
    return torch.outer(torch.arange(length).double(), base ** (-torch.arange(0, size, 2).double() / size))


def rotate_pairs(x: Tensor) -> Tensor:
    """Rotary positions for which elements 2i and 2i + 1 are a pair, as RoFormer and Meta have them. (B, heads, T, D)."""
    found = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = found * torch.polar(torch.tensor(1.0).double(), angles(x.shape[-2], x.shape[-1]))
    return torch.view_as_real(turned).flatten(-2)


def rotate_halves(x: Tensor) -> Tensor:
    """Rotary positions for which elements i and i + D/2 are a pair, as GPT-NeoX and Hugging Face have them."""
    one, other = x.chunk(2, -1)
    turn = angles(x.shape[-2], x.shape[-1])
    return torch.cat((one * turn.cos() - other * turn.sin(), one * turn.sin() + other * turn.cos()), -1)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in which several query heads share a key-value head."""
    times = q.shape[1] // k.shape[1]
    return attend(q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1), causal=True)


class MetaAttention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        size = width // heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, kv_heads * size, bias=False)
        self.wv = nn.Linear(width, kv_heads * size, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.wq(x), self.heads), split_heads(self.wk(x), self.kv_heads), split_heads(self.wv(x), self.kv_heads)
        return self.wo(grouped(rotate_pairs(q), rotate_pairs(k), v))


class GatedFeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MetaBlock(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = MetaAttention(width, heads, kv_heads)
        self.feed_forward = GatedFeedForward(width, hidden)
        self.attention_norm = RMSNorm(width)
        self.ffn_norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class MetaLlama(nn.Module):
    def __init__(self, vocab: int, width: int, heads: int, kv_heads: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(MetaBlock(width, heads, kv_heads, hidden) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.output = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


class SplitAttention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        size = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * size, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            split_heads(self.q_proj(x), self.heads),
            split_heads(self.k_proj(x), self.kv_heads),
            split_heads(self.v_proj(x), self.kv_heads),
        )
        return self.o_proj(grouped(rotate_halves(q), rotate_halves(k), v))


class SparseExperts(nn.Module):
    def __init__(self, width: int, hidden: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(GatedFeedForward(width, hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        share, number = self.gate(x).softmax(-1).topk(self.chosen, -1)
        share = share / share.sum(-1, keepdim=True)
        every = torch.stack([expert(x) for expert in self.experts], -2)
        return (share.unsqueeze(-1) * every.gather(-2, number.unsqueeze(-1).expand(*number.shape, x.shape[-1]))).sum(-2)


class MixtralBlock(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.self_attn = SplitAttention(width, heads, kv_heads)
        self.block_sparse_moe = SparseExperts(width, hidden, experts, 2)
        self.input_layernorm = RMSNorm(width)
        self.post_attention_layernorm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))


class Mixtral(nn.Module):
    def __init__(self, vocab: int, width: int, heads: int, kv_heads: int, layers: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(vocab, width),
                "layers": nn.ModuleList(MixtralBlock(width, heads, kv_heads, hidden, experts) for _ in range(layers)),
                "norm": RMSNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model["embed_tokens"](tokens)
        for layer in self.model["layers"]:
            x = layer(x)
        return self.lm_head(self.model["norm"](x))


# --- ResNet (torchvision's names)


def conv(given: int, wanted: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(given, wanted, size, stride, size // 2, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, given: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(given, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = nn.Sequential(conv(given, width, 1, stride), nn.BatchNorm2d(width)) if stride > 1 or given != width else None

    def forward(self, x: Tensor) -> Tensor:
        found = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(found + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, given: int, width: int, stride: int) -> None:
        super().__init__()
        wide = width * self.expansion
        self.conv1, self.bn1 = conv(given, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, wide, 1), nn.BatchNorm2d(wide)
        self.downsample = nn.Sequential(conv(given, wide, 1, stride), nn.BatchNorm2d(wide)) if stride > 1 or given != wide else None

    def forward(self, x: Tensor) -> Tensor:
        found = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(found)) + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, block: type[BasicBlock | Bottleneck], in_channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(in_channels, width, 7, 2), nn.BatchNorm2d(width)
        given = width
        for stage in range(1, 5):
            wide = width << (stage - 1)
            blocks = []
            for place in range(2):
                blocks.append(block(given, wide, 2 if stage > 1 and place == 0 else 1))
                given = wide * block.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(given, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(image))), 3, 2, 1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


# --- a convolutional network for frames, or for videos


class FrameNet(nn.Module):
    """Convolutions over (H, W), or with `frames` over (T, H, W) of a clip, T - 2 (frames - 1) of which are left."""

    def __init__(self, frames: int | None) -> None:
        super().__init__()
        layer, norm = (nn.Conv2d, nn.BatchNorm2d) if frames is None else (nn.Conv3d, nn.BatchNorm3d)
        size, padding = ((3, 3), (1, 1)) if frames is None else ((frames, 3, 3), (0, 1, 1))
        self.conv1, self.bn1 = layer(3, 6, size, padding=padding), norm(6)
        self.conv2, self.bn2 = layer(6, 8, size, padding=padding), norm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((-1, -2)).flatten(2).transpose(1, -1) if x.dim() == 5 else x.mean((-1, -2)))


# --- VGG's classifier as linear layers, and as convolutions that slide over a larger image


class Vgg(nn.Module):
    def __init__(self, sliding: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(4))
        wide: list[nn.Module] = [nn.Conv2d(6, 10, 4), nn.ReLU(), nn.Conv2d(10, 7, 1)]
        flat: list[nn.Module] = [nn.Linear(6 * 4 * 4, 10), nn.ReLU(), nn.Linear(10, 7)]
        self.sliding = sliding
        self.classifier = nn.Sequential(*(wide if sliding else flat))

    def forward(self, image: Tensor) -> Tensor:
        x = self.features(image)
        return self.classifier(x if self.sliding else x.flatten(1))


# --- weight norm, as torch's hooks named it and as its parametrizations name it


class WeightNormed(nn.Module):
    def __init__(self, parametrized: bool) -> None:
        super().__init__()
        norm: Any = nn.utils.parametrizations.weight_norm if parametrized else nn.utils.weight_norm
        self.encoder = nn.Sequential(norm(nn.Conv1d(3, 6, 5, padding=2)), nn.GELU(), norm(nn.Conv1d(6, 6, 3, padding=1)))
        self.head = norm(nn.Linear(6, 4))

    def forward(self, wave: Tensor) -> Tensor:
        return self.head(self.encoder(wave).mean(-1))


# --- Whisper (OpenAI's names)


class WhisperAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, given: Tensor | None = None, causal: bool = False) -> Tensor:
        other = x if given is None else given
        q, k, v = (split_heads(one, self.heads) for one in (self.query(x), self.key(other), self.value(other)))
        return self.out(attend(q, k, v, causal))


class WhisperBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, cross: bool) -> None:
        super().__init__()
        self.attn, self.attn_ln = WhisperAttention(width, heads), nn.LayerNorm(width)
        self.cross = cross
        if cross:
            self.cross_attn, self.cross_attn_ln = WhisperAttention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.mlp_ln = nn.LayerNorm(width)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.attn_ln(x), causal=self.cross)
        if self.cross:
            x = x + self.cross_attn(self.cross_attn_ln(x), given)
        return x + self.mlp(self.mlp_ln(x))


class WhisperEncoder(nn.Module):
    positional_embedding: Tensor

    def __init__(self, mels: int, length: int, width: int, heads: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.register_buffer("positional_embedding", torch.zeros(length, width))
        self.blocks = nn.ModuleList(WhisperBlock(width, heads, hidden, False) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)

    def forward(self, mels: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(mels)))).transpose(1, 2) + self.positional_embedding
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)


class WhisperDecoder(nn.Module):
    def __init__(self, vocab: int, length: int, width: int, heads: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, width)
        self.positional_embedding = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(WhisperBlock(width, heads, hidden, True) for _ in range(layers))
        self.ln = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, given: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, given)
        return self.ln(x) @ self.token_embedding.weight.T


class Whisper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = WhisperEncoder(8, 20, 16, 2, 2, 24)
        self.decoder = WhisperDecoder(50, 12, 16, 2, 2, 24)

    def forward(self, mels: Tensor, tokens: Tensor) -> Tensor:
        return self.decoder(tokens, self.encoder(mels))


# --- factories: what specs name


def nanogpt(layers: int = 2) -> NanoGPT:
    return NanoGPT(50, 16, 16, 2, layers, 64).double()


def timm_vit(image: int = 32) -> TimmViT:
    return TimmViT(image, 8, 16, 2, 2, 24, 5).double()


def torch_bert() -> TorchBert:
    return TorchBert(50, 20, 16, 4, 2, 24).double()


def meta_llama() -> MetaLlama:
    return MetaLlama(50, 32, 4, 2, 2, 24).double()


def mixtral() -> Mixtral:
    return Mixtral(50, 32, 4, 2, 2, 24, 11).double()  # 11 experts: as words, 10 stands before 2


def resnet(in_channels: int = 3, deep: bool = False) -> ResNet:
    return ResNet(Bottleneck if deep else BasicBlock, in_channels, 4, 5).double()


def frame_net() -> FrameNet:
    return FrameNet(None).double()


def video_net(frames: int = 3) -> FrameNet:
    return FrameNet(frames).double()


def vgg(sliding: bool = False) -> Vgg:
    return Vgg(sliding).double()


def weight_normed(parametrized: bool = False) -> WeightNormed:
    return WeightNormed(parametrized).double()


def whisper() -> Whisper:
    return Whisper().double()

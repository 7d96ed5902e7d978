"""A small Llama in plain PyTorch: what is pruned in the language-model study.

RMSNorm before each branch, rotary positions, query heads that share key and value heads, and gated
feed-forward layers; as in transformers' Llama, which is not needed here. Nothing in `forward`
depends on the number of heads, neurons or channels, so that the model runs on after any is removed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256


@dataclass(frozen=True)
class Sizes:
    """Of a `ByteLlama`; `heads` of `head_dim` channels share `groups` key and value heads."""

    width: int = 192
    hidden: int = 512
    layers: int = 5
    heads: int = 8
    groups: int = 4
    head_dim: int = 24
    context: int = 256


class Attention(nn.Module):
    """Causal self-attention with rotary positions; [N, T, width] to the same."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head_dim, self.shared_by = sizes.head_dim, sizes.heads // sizes.groups
        self.query = nn.Linear(sizes.width, sizes.heads * sizes.head_dim, bias=False)
        self.key = nn.Linear(sizes.width, sizes.groups * sizes.head_dim, bias=False)
        self.value = nn.Linear(sizes.width, sizes.groups * sizes.head_dim, bias=False)
        self.out = nn.Linear(sizes.heads * sizes.head_dim, sizes.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        key, value = (each.repeat_interleave(self.shared_by, dim=1) for each in (key, value))
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(heads.transpose(1, 2).flatten(2))


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels i and i + head_dim / 2 turned by an angle that grows with the position.

    Args:
        heads: [N, heads, T, head_dim].
        cos, sin: of the angles, [T, head_dim], the second half as the first.
    """
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


class FeedForward(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.up = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Attention and a feed-forward layer, each behind its norm and added to the stream."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(sizes.width, eps=1e-5)
        self.attention = Attention(sizes)
        self.feed_forward_norm = nn.RMSNorm(sizes.width, eps=1e-5)
        self.feed_forward = FeedForward(sizes)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class ByteLlama(nn.Module):
    """A decoder over bytes: [N, T] int64, T at most `context`, to logits [N, T, 256].

    Raises:
        ValueError: `heads` is no multiple of `groups`, or `head_dim` is odd.

    Example:
        >>> import torch
        >>> model = ByteLlama(Sizes(width=16, hidden=24, layers=1))
        >>> model(torch.zeros(1, 4, dtype=torch.int64)).shape
        torch.Size([1, 4, 256])
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        if sizes.heads % sizes.groups or sizes.head_dim % 2:
            raise ValueError(
                f"sizes: {sizes.heads} heads over {sizes.groups} groups of {sizes.head_dim} "
                "channels; heads must be a multiple of groups, and head_dim even"
            )
        self.embed = nn.Embedding(BYTES, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width, eps=1e-5)
        self.head = nn.Linear(sizes.width, BYTES, bias=False)
        rate = 10_000 ** (-torch.arange(0, sizes.head_dim, 2) / sizes.head_dim)
        angles = (torch.arange(sizes.context)[:, None] * rate).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What adds to the stream starts small, the more so the more layers add to it.
                adds = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
                std = 0.02 / math.sqrt(2 * sizes.layers) if adds else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        x, length = self.embed(tokens), tokens.size(1)
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        return self.head(self.norm(x))

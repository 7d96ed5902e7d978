"""Blocks of well-known transformers and of a diffusion network, small and written anew."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.structures import Run, Structure, structure


class Windows(nn.Module):
    """torchvision's Swin: attention in shifted windows, its weights used by functions."""

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        place = torch.stack(torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij")).flatten(1)
        gap = place[:, :, None] - place[:, None] + window - 1
        self.register_buffer("gaps", (gap[0] * (2 * window - 1) + gap[1]).flatten())

    def forward(self, x: Tensor) -> Tensor:
        n, height, width, c = x.shape
        side, places = self.window, self.window**2
        x = x.roll((-self.shift, -self.shift), (1, 2))
        x = x.view(n, height // side, side, width // side, side, c)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, places, c)
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias)
        qkv = qkv.reshape(len(x), places, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q * (c // self.heads) ** -0.5) @ k.mT
        bias = self.table[self.gaps].view(places, places, -1).permute(2, 0, 1)
        y = ((scores + bias[None]).softmax(-1) @ v).transpose(1, 2).reshape(len(x), places, c)
        y = F.linear(y, self.proj.weight, self.proj.bias)
        y = y.view(n, height // side, width // side, side, side, c)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(n, height, width, c)
        return y.roll((self.shift, self.shift), (1, 2))


def swin() -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.enter(x).permute(0, 2, 3, 1)
        for norm, attention, norm2, feed in zip(
            self.norms, self.attentions, self.norms2, self.feeds, strict=True
        ):
            x = x + attention(norm(x))
            x = x + feed(norm2(x))
        # Merged as between stages: four neighbours side by side.
        x = torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
        return self.leave(self.merge(self.norm(x)).mean((1, 2)))

    feeds = [nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)) for _ in range(2)]
    return Run(
        forward, enter=nn.Conv2d(3, 12, 1), norms=nn.ModuleList(nn.LayerNorm(12) for _ in range(2)),
        norms2=nn.ModuleList(nn.LayerNorm(12) for _ in range(2)), feeds=nn.ModuleList(feeds),
        attentions=nn.ModuleList(Windows(12, 3, 4, shift) for shift in (0, 2)),
        norm=nn.LayerNorm(48), merge=nn.Linear(48, 10, bias=False), leave=nn.Linear(10, 3),
    )  # fmt: skip


def mixer() -> nn.Module:
    """MLP-Mixer: linear layers over the tokens and over the channels by turns."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.enter(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.leave(self.last(x).mean(1))

    def feed(width: int, hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    return Run(
        forward, enter=nn.Conv2d(3, 12, 2, 2), tokens=feed(16, 9), channels=feed(12, 22),
        norm=nn.LayerNorm(12), norm2=nn.LayerNorm(12), last=nn.LayerNorm(12),
        leave=nn.Linear(12, 3),
    )  # fmt: skip


class Scaled(nn.Module):
    """A norm by the length of a token, of one's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.scale = nn.Parameter(torch.ones(width)), width**0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.scale * self.gain


def turned(x: Tensor, angles: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-two, one], -1) * angles.sin()


def decoder() -> nn.Module:
    """x-transformers': rotary positions, keys and values of one head, gated feed-forward."""

    def forward(self: nn.Module, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        n, t, _ = x.shape
        y = self.norm(x)
        q = self.q(y).view(n, t, self.heads, -1).transpose(1, 2)
        k, v = self.k(y)[:, None], self.v(y)[:, None]
        rates = 0.3 ** torch.arange(self.size // 2, dtype=x.dtype)
        angles = torch.outer(torch.arange(t, dtype=x.dtype), rates).repeat(1, 2)
        scores = turned(q, angles) @ turned(k, angles).mT * self.size**-0.5
        mask = torch.ones(t, t, dtype=torch.bool).triu(1)
        y = scores.masked_fill(mask, -1e9).softmax(-1) @ v
        x = x + self.project(y.transpose(1, 2).flatten(2))
        y, gate = self.up(self.norm2(x)).chunk(2, -1)
        x = x + self.down(y * F.silu(gate))
        return self.leave(self.last(x))

    return Run(
        forward, embed=nn.Embedding(11, 12), q=nn.Linear(12, 18, bias=False), size=6, heads=3,
        k=nn.Linear(12, 6, bias=False), v=nn.Linear(12, 6, bias=False),
        project=nn.Linear(18, 12, bias=False), up=nn.Linear(12, 40), down=nn.Linear(20, 12),
        norm=Scaled(12), norm2=Scaled(12), last=Scaled(12), leave=nn.Linear(12, 7),
    )  # fmt: skip


def timed_block(width: int, made: int) -> nn.Module:
    """Of a diffusion network: group norms, the time added between, a shortcut where it widens."""

    def forward(self: nn.Module, x: Tensor, time: Tensor) -> Tensor:
        y = self.one(F.silu(self.norm(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.two(F.silu(self.norm2(y)))

    return Run(
        forward, norm=nn.GroupNorm(2, width), one=nn.Conv2d(width, made, 3, padding=1),
        time=nn.Linear(10, made), norm2=nn.GroupNorm(2, made),
        two=nn.Conv2d(made, made, 3, padding=1),
        shortcut=nn.Conv2d(width, made, 1) if width != made else nn.Identity(),
    )  # fmt: skip


def diffusion() -> nn.Module:
    """diffusers' UNet2D: down, attention over pixels, up again beside what was kept."""

    def forward(self: nn.Module, x: Tensor, step: Tensor) -> Tensor:
        angles = step[:, None] * 0.5 ** torch.arange(4, dtype=x.dtype)
        time = self.time2(F.silu(self.time(torch.cat([angles.sin(), angles.cos()], 1))))
        x = self.enter(x)
        kept = self.first(x, time)
        x = self.second(self.down(kept), time)
        n, c, height, width = x.shape
        y = self.norm(x).view(n, c, -1).transpose(1, 2)
        q, k, v = (f(y).view(n, -1, self.heads, self.size).transpose(1, 2)
                   for f in (self.q, self.k, self.v))  # fmt: skip
        y = F.scaled_dot_product_attention(q, k, v, scale=0.4).transpose(1, 2)
        y = self.project(y.reshape(n, -1, self.heads * self.size))
        x = x + y.transpose(1, 2).reshape(n, c, height, width)
        x = self.up(F.interpolate(x, scale_factor=2.0))
        x = self.third(torch.cat([x, kept], 1), time)
        return self.leave(F.silu(self.last(x)))

    return Run(
        forward, time=nn.Linear(8, 10), time2=nn.Linear(10, 10), norm=nn.GroupNorm(2, 12),
        enter=nn.Conv2d(3, 8, 3, padding=1), first=timed_block(8, 8), second=timed_block(8, 12),
        down=nn.Conv2d(8, 8, 3, stride=2, padding=1), q=nn.Linear(12, 12), k=nn.Linear(12, 12),
        v=nn.Linear(12, 12), project=nn.Linear(12, 12), heads=3, size=4,
        up=nn.Conv2d(12, 12, 3, padding=1), third=timed_block(20, 8), last=nn.GroupNorm(2, 8),
        leave=nn.Conv2d(8, 3, 3, padding=1),
    )  # fmt: skip


def deformable_attention() -> nn.Module:
    """Deformable DETR's: each head reads images of two sizes at places that the query tells."""

    def forward(self: nn.Module, image: Tensor) -> Tensor:
        maps = [self.enter(image), self.down(image)]
        n = len(image)
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        around = torch.cat([_centres(x) for x in maps])[None].expand(n, -1, -1)
        x = self.embed(tokens)
        heads, levels, points = self.heads, len(maps), 3
        value = self.value(x).view(n, -1, heads, self.size)
        off = self.offsets(x).view(n, -1, heads, levels, points, 2)
        weights = self.weights(x).view(n, -1, heads, levels * points).softmax(-1)
        places = around[:, :, None, None, None] + 0.1 * off
        seen, begin = [], 0
        for level, each in enumerate(maps):
            height, width = each.shape[2:]
            own = value[:, begin : begin + height * width].flatten(2).transpose(1, 2)
            own = own.reshape(n * heads, self.size, height, width)
            grid = places[:, :, :, level].transpose(1, 2).flatten(0, 1)
            seen.append(F.grid_sample(own, grid, align_corners=False))
            begin += height * width
        weights = weights.transpose(1, 2).reshape(n * heads, 1, -1, levels * points)
        y = (torch.stack(seen, -2).flatten(-2) * weights).sum(-1)
        y = y.view(n, heads * self.size, -1).transpose(1, 2)
        return self.leave(self.norm(x + self.project(y)))

    return Run(
        forward, enter=nn.Conv2d(3, 8, 3, padding=1), down=nn.Conv2d(3, 8, 3, 2, 1),
        embed=nn.Linear(8, 12), value=nn.Linear(12, 20), offsets=nn.Linear(12, 4 * 2 * 3 * 2),
        weights=nn.Linear(12, 4 * 2 * 3), project=nn.Linear(20, 12), norm=nn.LayerNorm(12),
        leave=nn.Linear(12, 3), heads=4, size=5,
    )  # fmt: skip


def _centres(image: Tensor) -> Tensor:
    """Where pixels lie, from -1 to 1."""
    rows, columns = (torch.linspace(-1, 1, size, dtype=image.dtype) for size in image.shape[2:])
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).flatten(0, 1)


#: What stays beside outputs: tokens, of which the images make so many, and the one head of keys and
#: values that all queries share, whose keys are turned.
TOKENS: dict[str, Structure] = {
    "torchvision_swin": structure(swin, "leave"),
    "mlp_mixer": structure(mixer, "leave", "tokens.2"),
    "x_transformers": structure(
        decoder, "leave", "k", "v", inputs=lambda: torch.tensor([[3, 1, 4, 1, 5]])
    ),
    "deformable_attention": structure(deformable_attention, "leave"),
    "diffusers_unet2d": structure(
        diffusion, "leave", inputs=lambda: (torch.randn(1, 3, 8, 8), torch.rand(1))
    ),
}

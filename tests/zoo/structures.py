"""Small networks of one structure each, as people's public reports describe them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


class Run(nn.Module):
    """A module whose forward is a function of itself, with parts and sizes, and the inputs."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU())


def c2f() -> nn.Module:
    """YOLO's: two halves, a chain of bottlenecks from the second, all of them concatenated."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.leave(torch.cat(parts, 1)).mean((2, 3))

    blocks = nn.ModuleList([nn.Sequential(conv(8, 8), conv(8, 8)) for _ in range(2)])
    return Run(forward, enter=conv(3, 16, 1), blocks=blocks, leave=nn.Conv2d(32, 4, 1))


def split() -> nn.Module:
    """Two uneven parts that go different ways."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        one, two = self.enter(x).split([self.first, self.rest], 1)
        return self.leave(torch.cat([self.one(one), two.tanh()], 1)).mean((2, 3))

    return Run(
        forward, enter=conv(3, 16), one=conv(6, 8), leave=nn.Conv2d(18, 4, 1), first=6, rest=10
    )


def channel_shuffle() -> nn.Module:
    """View, transpose, reshape, between a pointwise and a depthwise convolution."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.enter(x)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.leave(self.depth(y)).mean((2, 3))

    return Run(
        forward, enter=conv(3, 16, 1), depth=conv(16, 16, groups=16), leave=nn.Conv2d(16, 4, 1)
    )


def pixel_shuffle() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.Conv2d(8, 32, 3, padding=1), nn.PixelShuffle(2), nn.ReLU(),
        nn.Conv2d(8, 2, 3, padding=1),
    )  # fmt: skip


def pixel_unshuffle() -> nn.Module:
    return nn.Sequential(conv(3, 6), nn.PixelUnshuffle(2), conv(24, 8), nn.Conv2d(8, 2, 1))


def maxout() -> nn.Module:
    """The greatest of each pair of neighbours, and of the two halves."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.one(x)
        y = y.reshape(len(y), -1, 2, *y.shape[2:]).amax(2)
        return self.leave(torch.maximum(*self.two(y).chunk(2, 1))).mean((2, 3))

    return Run(forward, one=conv(3, 16), two=conv(8, 12), leave=nn.Conv2d(6, 4, 1))


def partial_convolution() -> nn.Module:
    """FasterNet's: only the first quarter of the channels is convolved."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.enter(x)
        one, two = y.split([self.touched, self.untouched], 1)
        y = torch.cat([self.part(one), two], 1)
        return self.leave(self.mix(y) + y).mean((2, 3))

    mix = nn.Sequential(conv(16, 32, 1), nn.Conv2d(32, 16, 1))
    return Run(
        forward, enter=conv(3, 16), part=nn.Conv2d(4, 4, 3, padding=1), mix=mix,
        leave=nn.Conv2d(16, 4, 1), touched=4, untouched=12,
    )  # fmt: skip


def conv_lstm() -> nn.Module:
    """Text recognition: columns of a feature map are read by a recurrent layer."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.features(x).flatten(1, 2).transpose(1, 2)
        return self.leave(self.rnn(y)[0])

    rnn = nn.LSTM(12 * 4, 10, batch_first=True, bidirectional=True)
    features = nn.Sequential(conv(3, 8), nn.AvgPool2d(2), conv(8, 12))
    return Run(forward, features=features, rnn=rnn, leave=nn.Linear(20, 5))


def adaptive_norm() -> nn.Module:
    """A DiT block: six chunks of a condition modulate norms without weights of their own."""

    def forward(self: nn.Module, x: Tensor, condition: Tensor) -> Tensor:
        x = self.enter(x)
        shift, scale, gate, shift2, scale2, gate2 = self.condition(condition)[:, None].chunk(6, -1)
        y = self.norm(x) * (1 + scale) + shift
        q, k, v = self.qkv(y).reshape(*y.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.project(y)
        y = self.norm2(x) * (1 + scale2) + shift2
        return self.leave(x + gate2 * self.down(F.gelu(self.up(y))))

    norms = [nn.LayerNorm(12, elementwise_affine=False) for _ in range(2)]
    return Run(
        forward, enter=nn.Linear(4, 12), condition=nn.Linear(5, 72), qkv=nn.Linear(12, 48),
        project=nn.Linear(16, 12), up=nn.Linear(12, 24), down=nn.Linear(24, 12),
        norm=norms[0], norm2=norms[1], leave=nn.Linear(12, 3), heads=2,
    )  # fmt: skip


def reduced_attention() -> nn.Module:
    """PVT's and SegFormer's: keys and values of a smaller image, made as wide as the stream."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.enter(x)
        batch, _, width = x.shape
        y = self.reduce(x.transpose(1, 2).reshape(batch, width, 4, 4))
        y = self.norm(y.reshape(batch, width, -1).transpose(1, 2))
        q, k, v = self.query(x)[:, None], self.key(y)[:, None], self.value(y)[:, None]
        y = F.scaled_dot_product_attention(q, k, v, scale=0.3)[:, 0]
        return self.leave(x + self.project(y))

    return Run(
        forward, enter=nn.Linear(4, 12), reduce=nn.Conv2d(12, 12, 2, 2), norm=nn.LayerNorm(12),
        query=nn.Linear(12, 8), key=nn.Linear(12, 8), value=nn.Linear(12, 10),
        project=nn.Linear(10, 12), leave=nn.Linear(12, 3),
    )  # fmt: skip


def same_twice() -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.enter(x)
        return self.leave(torch.cat([y, y.relu(), y], 1)).mean((2, 3))

    return Run(forward, enter=conv(3, 8), leave=nn.Conv2d(24, 4, 1))


def padded_shortcut() -> nn.Module:
    """PyramidNet's: the shortcut gets zeros for the channels that it lacks."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(self.body(x) + F.pad(x, (0, 0, 0, 0, 0, 4))).mean((2, 3))

    body = nn.Sequential(conv(8, 12), nn.Conv2d(12, 12, 3, padding=1))
    return Run(forward, enter=conv(3, 8), body=body, leave=nn.Conv2d(12, 4, 1))


def dual_path() -> nn.Module:
    """DPN's: the first channels of a block are added, the others appended."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            y = block(x)
            w = self.width
            x = torch.cat([x[:, :w] + y[:, :w], x[:, w:], y[:, w:]], 1)
        return self.leave(x).mean((2, 3))

    blocks = nn.ModuleList([conv(12, 10), conv(14, 10)])
    return Run(forward, enter=conv(3, 12), blocks=blocks, leave=nn.Conv2d(16, 4, 1), width=8)


def split_attention() -> nn.Module:
    """ResNeSt's: two splays weighed by a softmax over both."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.radix(x)
        parts = x.view(len(x), 2, x.shape[1] // 2, *x.shape[2:])
        gates = self.up(self.down(parts.sum(1).mean((2, 3), keepdim=True)).relu())
        y = (parts * gates.view(len(x), 2, -1, 1, 1).softmax(1)).sum(1)
        return self.leave(y).mean((2, 3))

    return Run(
        forward, radix=conv(3, 16), down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 16, 1),
        leave=nn.Conv2d(8, 4, 1),
    )  # fmt: skip


def weight_norm() -> nn.Module:
    first = parametrizations.weight_norm(nn.Conv2d(3, 12, 3, padding=1))
    return nn.Sequential(first, nn.ReLU(), conv(12, 8), nn.Conv2d(8, 2, 1))


def spectral_norm() -> nn.Module:
    first = parametrizations.spectral_norm(nn.Conv2d(3, 12, 3, padding=1))
    return nn.Sequential(first, nn.ReLU(), conv(12, 8), nn.Conv2d(8, 2, 1))


def group_norm() -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(x + self.two(self.one(self.norm(x).relu()).relu())).mean((2, 3))

    return Run(
        forward, enter=nn.Conv2d(3, 16, 3), norm=nn.GroupNorm(4, 16), leave=nn.Conv2d(16, 4, 1),
        one=nn.Conv2d(16, 12, 3, padding=1), two=nn.Conv2d(12, 16, 3, padding=1),
    )  # fmt: skip


def transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(4, 16), encoder, nn.Linear(16, 3))


def functional_weight() -> nn.Module:
    """A layer whose weight a function uses: the module itself is never called."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = F.linear(self.enter(x).relu(), self.middle.weight, self.middle.bias).relu()
        return self.leave(y)

    return Run(forward, enter=nn.Linear(4, 12), middle=nn.Linear(12, 10), leave=nn.Linear(10, 3))


@dataclass(frozen=True)
class Structure:
    """A small network.

    Attributes:
        stays: layers whose filters cannot go; all others can.
        params: the fraction of parameters that it is pruned to.
        criterion: taylor_fo reads the gradients of a weight, which a computed one does not hold.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    stays: frozenset[str]
    params: float = 0.7
    criterion: str = "taylor_fo"


def _image() -> Tensor:
    return torch.randn(1, 3, 8, 8)


def structure(
    build: Callable[[], nn.Module], *stays: str, inputs: Callable[[], Any] = _image, **more: Any
) -> Structure:
    return Structure(build, inputs, frozenset(stays), **more)


def _tokens() -> Tensor:
    return torch.randn(1, 5, 4)


#: Of each, what has to stay is what gives the output its width.
STRUCTURES: dict[str, Structure] = {
    "c2f": structure(c2f, "leave"),
    "split": structure(split, "leave"),
    "channel_shuffle": structure(channel_shuffle, "leave"),
    "pixel_shuffle": structure(pixel_shuffle, "4"),
    "pixel_unshuffle": structure(pixel_unshuffle, "3"),
    "maxout": structure(maxout, "leave"),
    "partial_convolution": structure(partial_convolution, "leave"),
    "conv_lstm": structure(conv_lstm, "leave"),
    "adaptive_norm": structure(
        adaptive_norm, "leave", inputs=lambda: (_tokens(), torch.randn(1, 5)), params=0.8,
    ),
    "reduced_attention": structure(
        reduced_attention, "leave", inputs=lambda: torch.randn(1, 16, 4)
    ),
    "same_twice": structure(same_twice, "leave"),
    "padded_shortcut": structure(padded_shortcut, "leave"),
    "dual_path": structure(dual_path, "leave"),
    "split_attention": structure(split_attention, "leave"),
    "weight_norm": structure(weight_norm, "3", criterion="taylor_fo_gate"),
    "spectral_norm": structure(spectral_norm, "3", criterion="taylor_fo_gate"),
    "group_norm": structure(group_norm, "leave"),
    "transformer_encoder": structure(transformer_encoder, "2", inputs=_tokens),
    "functional_weight": structure(functional_weight, "leave", inputs=_tokens),
}  # fmt: skip

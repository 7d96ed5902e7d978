"""Networks with one structure each that hangs channels together in its own way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tracing.pieces import Apply, Attention, Partial


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Sequential:
    return nn.Sequential(
        conv(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs), nn.SiLU()
    )


def c2f(self: nn.Module, x: Tensor) -> Tensor:
    parts = list(self.enter(x).chunk(2, 1))
    for block in self.blocks:
        parts.append(parts[-1] + block(parts[-1]))
    return self.leave(torch.cat(parts, 1))


def shuffled(self: nn.Module, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def split_attention(self: nn.Module, x: Tensor) -> Tensor:
    """ResNeSt: two branches of one grouped convolution, weighed against each other."""
    n, _, h, w = x.shape
    branches = self.both(x).view(n, 2, -1, h, w)
    pooled = branches.sum(1).mean((2, 3), keepdim=True)
    weights = self.up(F.relu(self.down(pooled))).view(n, 2, -1, 1, 1).softmax(1)
    return (branches * weights).sum(1)


def halves(self: nn.Module, x: Tensor) -> Tensor:
    one, two = x.chunk(2, 1)
    return torch.cat([one.relu(), two.sigmoid()], 1)


class Tokens(nn.Module):
    """A recurrent layer over the pixels of a picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(width, 6, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.flatten(2).transpose(1, 2))[0].transpose(1, 2)[..., None]


class Used(nn.Module):
    """The weight of a linear layer that is used by a function."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, 9)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x.flatten(2).mT, self.hidden.weight, self.hidden.bias)
        return hidden.tanh().mT[..., None]


class Tied(nn.Module):
    """An encoder whose weight decodes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encode = nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        code = self.encode(x.flatten(2).mT).sigmoid()
        return F.linear(code, self.encode.weight.t()).mT[..., None]


def made(*middle: nn.Module, enter: int = 8, leave: int = 8) -> nn.Sequential:
    """What is before and behind: convolutions "0" and "3", a classifier "6"."""
    body = middle[0] if len(middle) == 1 else nn.Sequential(*middle)
    return nn.Sequential(
        conv(3, enter), nn.Sigmoid(), body, conv(leave, 6), nn.ReLU(),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(6, 3),
    )  # fmt: skip


#: name -> (model, layers that have to stay beside the classifier). Inputs are [2, 3, 6, 6].
STRUCTURES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "c2f": (
        lambda: made(Apply(c2f, enter=conv_bn(8, 12, 1), leave=conv_bn(24, 8, 1),
                           blocks=nn.ModuleList(conv_bn(6, 6) for _ in range(2)))),
        set(),
    ),
    "halves": (lambda: made(Apply(halves)), set()),
    "shuffle": (lambda: made(Apply(shuffled)), set()),
    "grouped_shuffle": (
        lambda: made(conv(8, 8, groups=2), Apply(shuffled), conv(8, 8, groups=2)), set()
    ),
    "pixel_shuffle": (lambda: made(nn.PixelShuffle(2), enter=16, leave=4), set()),
    "pixel_unshuffle": (lambda: made(nn.PixelUnshuffle(2), enter=4, leave=16), set()),
    "padded_shortcut": (
        lambda: made(Apply(lambda s, x: s.body(x) + F.pad(x, (0, 0, 0, 0, 0, 4)), body=conv(8, 12)),
                     leave=12),
        set(),
    ),
    "split_attention": (
        lambda: made(Apply(split_attention, both=conv(8, 16, groups=2), down=conv(8, 4, 1),
                           up=conv(4, 16, 1))),
        set(),
    ),
    "glu": (lambda: made(nn.GLU(1), enter=16), set()),
    "maxout": (
        lambda: made(Apply(lambda s, x: x.reshape(len(x), -1, 2, *x.shape[2:]).amax(2)), leave=4),
        set(),
    ),
    "partial": (lambda: made(Partial(8, 2, written=False)), set()),
    "packed_heads": (lambda: made(Attention(8, 4, 1, 3, "packed")), set()),
    "grouped_queries": (lambda: made(Attention(8, 4, 2, 3, "plain")), set()),
    "fused_grouped_queries": (lambda: made(Attention(8, 4, 2, 3, "fused")), set()),
    "lstm": (lambda: made(Tokens(8), leave=12), set()),
    "weight_norm": (
        lambda: made(nn.utils.parametrizations.weight_norm(conv(8, 8)), nn.Tanh()), {"2.0"}
    ),
    "weight_used_by_a_function": (lambda: made(Used(8), leave=9), set()),
    "tied": (lambda: made(Tied(8)), set()),
    "broadcast_gate": (
        lambda: made(Apply(lambda s, x: x * s.mask(x).sigmoid(), mask=conv(8, 1))), {"2.mask"}
    ),
    "transposed_groups": (
        lambda: made(nn.ConvTranspose2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)), set()
    ),
}  # fmt: skip


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A fresh network in float64 and its inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return STRUCTURES[name][0]().double(), torch.randn(2, 3, 6, 6).double()

"""Stages of channel shuffles and halves, as in ShuffleNetV2, with what may be inside."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import taylor_kernels as tk


def branch(width: int, out: int, depth: int) -> nn.Sequential:
    """Convolutions and norms; depth says how many pairs there are."""
    layers: list[nn.Module] = []
    for number in range(depth):
        last = number == depth - 1
        inner = out if last else width + number
        layers += [nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner)]
        if not last:
            layers += [nn.ReLU(), nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)]
        width = inner
    return nn.Sequential(*layers)


def _by_view(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def _by_pairs(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, c // 2, 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


#: Ways to write a shuffle of two groups, or its inverse.
SHUFFLES: list[Callable[[Tensor], Tensor]] = [
    _by_view, _by_pairs, lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
    lambda x: nn.functional.channel_shuffle(x, 2), nn.ChannelShuffle(2),
]  # fmt: skip
#: Ways to write a cut in halves.
CUTS: list[Callable[[Block, Tensor], Sequence[Tensor]]] = [
    lambda self, x: x.chunk(2, 1),
    lambda self, x: x.split(x.size(1) // 2, 1),
    lambda self, x: (x[:, : x.size(1) // 2], x[:, x.size(1) // 2 :]),
    lambda self, x: x.split([self.half, self.half], 1),
    lambda self, x: (x[:, : self.half], x[:, self.half :]),
]


class Block(nn.Module):
    """One half passes, the other goes through a branch, and both are shuffled.

    Args:
        half: the width of a half.
        way: how the cut and the shuffle are written.
        residual: the branch is added to what it reads.
        scaled: the branch's output is scaled, channel by channel, by a table that no state has.
    """

    def __init__(
        self,
        half: int,
        depth: int,
        way: tuple[int, int] = (0, 0),
        *,
        residual: bool = False,
        scaled: bool = False,
    ) -> None:
        super().__init__()
        self.half, self.cut, self.shuffle = half, CUTS[way[0]], SHUFFLES[way[1]]
        self.body, self.residual = branch(half, half, depth), residual
        scale = torch.linspace(0.5, 1.5, half).view(-1, 1, 1) if scaled else None
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rest, mine = self.cut(self, x)
        made = self.body(mine)
        if self.scale is not None:
            made = made * self.scale
        if self.residual:
            made = made + mine
        return self.shuffle(torch.cat([rest, made.relu()], 1))


class First(nn.Module):
    """Two branches of all channels, shuffled."""

    def __init__(self, width: int, half: int, depth: int) -> None:
        super().__init__()
        self.one, self.other = branch(width, half, 1), branch(width, half, depth)

    def forward(self, x: Tensor) -> Tensor:
        return _by_view(torch.cat([self.one(x), self.other(x)], 1).relu())


class Added(nn.Module):
    """A residual block of the whole stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = branch(width, width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Beside(nn.Module):
    """The stream twice, and what a convolution makes of it, side by side."""

    def __init__(self, width: int, made: int) -> None:
        super().__init__()
        self.make = nn.Conv2d(width, made, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.make(x), x.sin()], 1)


def with_drawn_norms(model: nn.Sequential) -> nn.Sequential:
    """The model in float64, its BatchNorms with values that do not leave things as they are."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in (
                (module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5),
                (module.running_var, 0.5),
            ):  # fmt: skip
                tensor.data.uniform_(low, low + 1)
    return model.double()


def drawn_network(seed: int, *, residual: bool = False, scaled: bool = False) -> nn.Sequential:
    """Some stages in a row with a classifier, all values drawn.

    Args:
        residual: branches are added to what they read, in the last stage.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    width = draw.randint(3, 5)
    parts: list[nn.Module] = [nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.ReLU()]
    stages = draw.randint(1, 2)
    for stage in range(stages):
        half = draw.randint(4, 15)
        parts.append(First(width, half, draw.randint(1, 2)))
        between = draw.random() < 0.3
        add = residual and stage == stages - 1
        for number in range(draw.randint(2, 8)):
            depth = draw.randint(1, 2)
            way = draw.randrange(len(CUTS)), draw.randrange(len(SHUFFLES))
            extra = scaled and number == 0
            parts.append(Block(half, depth, way, residual=add, scaled=extra))
        width = 2 * half
        if between:
            parts.append(Added(width))
        if draw.random() < 0.3:
            made = draw.randint(2, 4)
            parts.append(Beside(width, made))
            width = 2 * width + made
    model = nn.Sequential(
        *parts, nn.Conv2d(width, 7, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(7, 2),
    )  # fmt: skip
    return with_drawn_norms(model)


class Run:
    """A network in training, with its pruner and optimizer."""

    def __init__(self, model: nn.Module, **options: object) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=0.1)
        options = {"criterion": "taylor_fo", "every": 1, "per_step": 0.1, **options}
        inputs = torch.randn(1, 3, 4, 4, dtype=torch.float64)
        self.pruner = tk.Pruner(model, inputs, optimizer=self.optimizer, **options)

    def step(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        self.model.train()(x).square().sum().backward()
        if not self.pruner.done:
            self.pruner.step()
        self.optimizer.step()

    def outputs(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.eval()(x)


def staged(pruner: tk.Pruner) -> int:
    """How many groups go in step with others."""
    return sum(group.schedule is not None for group in pruner._prunable.groups)

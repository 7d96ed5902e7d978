"""Networks whose norms come later than directly behind a layer, and gates written out in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_kernels.tracing import Channels

#: (module, "in" or "out", the channels' dimension from the end).
Place = tuple[str, str, int]
Sites = Mapping[str, tuple[Place, ...]]


def conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


class ReluNorm(nn.Sequential):
    """Convolution, ReLU, norm."""

    sites: ClassVar[Sites] = {
        "0": (("2", "out", -3),), "3": (("5", "out", -3),),
    }  # fmt: skip

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__(
            conv(3, 6), nn.ReLU(), norm(6), conv(6, 8), nn.ReLU(), norm(8), nn.ReLU(), head(8)
        )


class PoolNorm(nn.Sequential):
    """Convolution, pooling, norm; then two norms in a row."""

    sites: ClassVar[Sites] = {"0": (("2", "out", -3),), "4": (("6", "out", -3),)}

    def __init__(self) -> None:
        super().__init__(
            conv(3, 6), nn.AvgPool2d(2), nn.BatchNorm2d(6), nn.ReLU(),
            conv(6, 7), nn.BatchNorm2d(7), nn.InstanceNorm2d(7, affine=True), nn.ReLU(), head(7),
        )  # fmt: skip


class PreActivation(nn.Module):
    """A residual stream that each block reads through its own norm; one reader takes it raw."""

    sites: ClassVar[Sites] = {
        "stem": (("n1", "out", -3), ("n3", "out", -3), ("last", "out", -3), ("raw", "in", -3)),
        "c1": (("n2", "out", -3),),
        "c3": (("n4", "out", -3),),
        "raw": (("raw", "out", -3),),
    }

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.n1, self.c1, self.n2, self.c2 = (
            nn.BatchNorm2d(6),
            conv(6, 5),
            nn.BatchNorm2d(5),
            conv(5, 6),
        )
        self.n3, self.c3, self.n4, self.c4 = (
            nn.BatchNorm2d(6),
            conv(6, 7),
            nn.BatchNorm2d(7),
            conv(7, 6),
        )
        self.raw, self.last, self.head = conv(6, 4, 1), nn.BatchNorm2d(6), head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.c2(F.relu(self.n2(self.c1(F.relu(self.n1(x))))))
        raw = self.raw(x)
        x = x + self.c4(F.relu(self.n4(self.c3(F.relu(self.n3(x))))))
        return self.head(torch.cat((F.relu(self.last(x)), raw), 1))


class Dense(nn.Module):
    """Layers read all that came before, concatenated, through norms of their own."""

    sites: ClassVar[Sites] = {
        "stem": (("n1", "out", -3), ("n2", "out", -3), ("n3", "out", -3)),
        "c1": (("n2", "out", -3), ("n3", "out", -3)),
        "c2": (("n3", "out", -3),),
    }

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n1, self.c1 = conv(3, 6), nn.BatchNorm2d(6), conv(6, 4)
        self.n2, self.c2, self.n3, self.head = (
            nn.BatchNorm2d(10),
            conv(10, 4),
            nn.BatchNorm2d(14),
            head(14),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat((x, self.c1(F.relu(self.n1(x)))), 1)
        x = torch.cat((x, self.c2(F.relu(self.n2(x)))), 1)
        return self.head(F.relu(self.n3(x)))


class BehindSum(nn.Module):
    """Two layers that meet in a sum with one norm behind it, and a depthwise layer after that."""

    sites: ClassVar[Sites] = {
        "a": (("n2", "out", -3),),
        "b": (("n2", "out", -3),),
        "depth": (("n2", "out", -3),),
    }

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = conv(3, 6), conv(3, 6, 1), nn.BatchNorm2d(6)
        self.depth, self.n2, self.head = conv(6, 6, groups=6), nn.BatchNorm2d(6), head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x) + self.b(x)))
        return self.head(F.relu(self.n2(self.depth(x))))


class OwnNorm(nn.Module):
    """A norm of the user's own class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = (
            nn.Parameter(torch.rand(width) + 0.5),
            nn.Parameter(torch.randn(width)),
        )
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.gain, self.shift, self.training)


class Functional(nn.Module):
    """Norms by function, which no hook can reach: the readers' inputs stand in for them."""

    sites: ClassVar[Sites] = {"a": (("b", "in", -3),), "b": (("head.2", "in", -1),)}

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 8), head(8)
        self.gain = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.batch_norm(F.relu(self.a(x)), None, None, self.gain, training=True))
        return self.head(F.relu(F.batch_norm(self.b(x), None, None, training=True)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "relu, norm": ReluNorm,
    "own norm": lambda: ReluNorm(OwnNorm),
    "instance norm": lambda: ReluNorm(nn.InstanceNorm2d),
    "no affine": lambda: ReluNorm(lambda n: nn.BatchNorm2d(n, affine=False)),
    "pool, norm, norm": PoolNorm,
    "pre-activation": PreActivation,
    "dense": Dense,
    "behind a sum": BehindSum,
    "functional": Functional,
}


def lived(model: nn.Module) -> nn.Module:
    """In float64, with norms that have seen and learned something."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.0, 0.1)
    return model.double()


@contextmanager
def gated(model: nn.Module, places: Mapping[Place, Tensor], gates: Tensor) -> Iterator[None]:
    """Channel i of a place is multiplied by gates[places[place][i]], where that is not below 0."""

    def change(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
        factors = torch.where(index < 0, 1.0, gates[index.clamp(min=0)])
        return tensor * factors.view([-1] + [1] * (-1 - dim))

    with ExitStack() as stack:
        for (name, side, dim), index in places.items():
            module = model.get_submodule(name)
            if side == "in":
                handle = module.register_forward_pre_hook(
                    lambda _, args, d=dim, i=index: change(args[0], d, i)
                )
            else:
                handle = module.register_forward_hook(
                    lambda _, __, output, d=dim, i=index: change(output, d, i)
                )
            stack.callback(handle.remove)
        yield


def readers_of(channels: Channels, model: nn.Module, classes: Tensor) -> dict[Place, Tensor]:
    """The inputs of all layers that read these classes and are not of them: where removal acts."""
    places: dict[Place, Tensor] = {}
    for name, (inputs, outputs) in channels.layers.items():
        index = torch.full_like(inputs, -1)
        for number, one in enumerate(classes.tolist()):
            index[inputs == one] = number
        depthwise = inputs.equal(outputs) and getattr(model.get_submodule(name), "groups", 1) > 1
        if (index >= 0).any() and not depthwise:
            dim = -1 if isinstance(model.get_submodule(name), nn.Linear) else -3
            places[name, "in", dim] = index
    return places

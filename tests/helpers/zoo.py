"""Small models of every shape that pruning has to get right, each with inputs it runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Vgg(nn.Module):
    """Convolutions with biases and sigmoids (f(0) is not 0), flattened into linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Sigmoid(), nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(12 * 16, 10), nn.Tanh(), nn.Linear(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class Block(nn.Module):
    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.one = conv_bn(width, 2 * width, 1)
        self.two = conv_bn(2 * width, 2 * width, 3, groups=groups)
        self.three = nn.Conv2d(2 * width, width, 1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.three(self.two(self.one(x)))))


class ResNet(nn.Module):
    """Bottleneck blocks with skips; groups > 1 makes it a ResNeXt."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.blocks = nn.Sequential(Block(8, groups), Block(8, groups))
        self.down = conv_bn(8, 12, stride=2)
        self.last = Block(12, groups)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.down(self.blocks(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(6 + 4 * i), nn.ReLU(), nn.Conv2d(6 + 4 * i, 4, 3, padding=1)
            )
            for i in range(3)
        )
        self.norm = nn.BatchNorm2d(18)
        self.fc = nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1).flatten(1))


class MobileNet(nn.Module):
    """Inverted residuals: depthwise convolutions ride along with what is before them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.expand = conv_bn(8, 16, 1)
        self.depthwise = conv_bn(16, 16, 3, groups=16)
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = conv_bn(8, 12, 1)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.fc(self.head(x).mean((2, 3)))


class UNet(nn.Module):
    """Down, up by a transposed convolution, concatenated with the skip."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.enter = conv_bn(2, 6)
        self.down = conv_bn(6, 8, stride=2)
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.PReLU(8))
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=groups)
        self.merge = conv_bn(12, 6)
        self.out = nn.Conv2d(6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enter(x)
        up = F.gelu(self.up(self.middle(self.down(skip))))
        return self.out(self.merge(torch.cat([up, skip], 1)))


class Transformer(nn.Module):
    """Two MLP blocks on a residual stream that LayerNorm mixes: only hidden units can go."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(8, 12) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(12, 8) for _ in range(2))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(F.gelu(up(norm(x))))
        return self.out(x.mean(1))


class TwoInputs(nn.Module):
    """Two inputs, two heads, and an output that holds more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(5, 8)
        self.right = nn.Linear(3, 8)
        self.trunk = nn.Sequential(nn.Linear(8, 10), nn.Sigmoid(), nn.Linear(10, 7), nn.ELU())
        self.heads = nn.ModuleList([nn.Linear(7, 2), nn.Linear(7, 3)])

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
        x = self.trunk(torch.tanh(self.left(a) + self.right(b)))
        return {"heads": [head(x) for head in self.heads], "name": "two", "step": 3, "none": None}


class Gated(nn.Module):
    """GLU: the two halves of one layer's output are multiplied, so they go together."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 16)
        self.down = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.up(x).chunk(2, 1)
        return self.down(one * torch.sigmoid(two))


class Shared(nn.Module):
    """One layer used twice in a row: its inputs and outputs are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 9)
        self.again = nn.Linear(9, 9)
        self.leave = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        return self.leave(torch.relu(self.again(torch.relu(self.again(x)))))


class Odd(nn.Module):
    """Instance norms with statistics, a bare parameter, 1-D and 3-D widths that divide nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(3, 7, 3, padding=1)
        self.norm = nn.InstanceNorm1d(7, affine=True, track_running_stats=True)
        self.scale = nn.Parameter(torch.rand(7, 1) + 0.5)
        self.b = nn.Conv1d(7, 11, 1)
        self.c = nn.Conv1d(11, 5, 1)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.norm(self.a(x))) * self.scale
        return self.fc(F.relu(self.c(torch.cos(self.b(x)))).mean(2))


def mlp() -> nn.Module:
    hidden = [nn.Linear(6, 10), nn.Sigmoid(), nn.Linear(10, 9), nn.BatchNorm1d(9), nn.GELU()]
    return nn.Sequential(*hidden, nn.Linear(9, 3))


def image(channels: int = 3, size: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size)


#: name -> (model, example inputs)
ZOO: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "mlp": lambda: (mlp(), torch.randn(4, 6)),
    "vgg": lambda: (Vgg(), image()),
    "resnet": lambda: (ResNet(), image()),
    "resnext": lambda: (ResNet(groups=4), image()),
    "densenet": lambda: (DenseNet(), image()),
    "mobilenet": lambda: (MobileNet(), image()),
    "unet": lambda: (UNet(), image(2)),
    "unet_grouped": lambda: (UNet(groups=2), image(2)),
    "transformer": lambda: (Transformer(), (torch.randn(2, 5, 6),)),
    "two_inputs": lambda: (TwoInputs(), {"a": torch.randn(4, 5), "b": torch.randn(4, 3)}),
    "gated": lambda: (Gated(), torch.randn(3, 6)),
    "shared": lambda: (Shared(), torch.randn(3, 4)),
    "odd": lambda: (Odd(), torch.randn(2, 3, 6)),
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, Any]:
    """A fresh model of the zoo and its inputs, with norms that have seen something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, inputs = ZOO[name]()
        for module in model.modules():
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.InstanceNorm1d)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.to(dtype), to_dtype(inputs, dtype)


def to_dtype(inputs: Any, dtype: torch.dtype) -> Any:
    return torch.utils._pytree.tree_map(lambda tensor: tensor.to(dtype), inputs)


def fresh(inputs: Any, batch: int = 6) -> Any:
    """Other inputs of the same kind."""
    return torch.utils._pytree.tree_map(
        lambda t: torch.randn(batch, *t.shape[1:], dtype=t.dtype), inputs
    )


def forward(model: nn.Module, inputs: Any) -> Tensor:
    """All outputs of a model in one tensor, [batch, ...]."""
    if isinstance(inputs, dict):
        outputs = model(**inputs)
        return torch.cat(outputs["heads"], 1)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def loss(model: nn.Module, inputs: Any) -> Tensor:
    """A loss with gradients of every sign and no symmetry."""
    out = forward(model, inputs)
    target = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device)
    return (out - target.reshape(out.shape)).square().mean()

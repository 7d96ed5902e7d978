"""Networks of whole residual blocks of every kind, and what a pruner finds in them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_kernels.pruning import Pruner
from taylor_kernels.studies.networks import DigitsResNet

WIDTH = 6


class Basic(nn.Module):
    """As in ResNet, added in place, with one ReLU module for everything."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Inverted(nn.Module):
    """As in MobileNetV2: a linear bottleneck."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1), nn.BatchNorm2d(2 * width), nn.ReLU6(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width), nn.ReLU6(),
            nn.Conv2d(2 * width, width, 1), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Excitation(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(width, width, 1)

    def forward(self, y: Tensor) -> Tensor:
        return y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()


class Scaled(nn.Module):
    """A branch behind its norm, with an excitation, scaled by a number on its way to the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.gate = Excitation(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(self.conv(F.relu(self.norm(x))))
        return 0.3 * y + x


class Attention(nn.Module):
    """Before or after its norm; returns its weights too."""

    def __init__(self, width: int, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, 2, batch_first=True)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x) if self.norm_first else x
        y, _ = self.attend(y, y, y, need_weights=False)
        return x + self.drop(y) if self.norm_first else self.norm(x + self.drop(y))


class Feed(nn.Module):
    """A gated feed-forward branch in front of which stands a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.gate = nn.Linear(width, 9), nn.Linear(width, 9)
        self.down = nn.Linear(9, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def images(*blocks: nn.Module) -> nn.Sequential:
    """A network of image blocks."""
    stem = [nn.Conv2d(2, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 3))


def tokens(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, WIDTH), *blocks, nn.Linear(WIDTH, 3))


KINDS = {
    "basic": lambda: (images(*(Basic(WIDTH) for _ in range(3))), (2, 5, 5)),
    "inverted": lambda: (images(Inverted(WIDTH), Inverted(WIDTH)), (2, 5, 5)),
    "scaled": lambda: (images(Scaled(WIDTH), Basic(WIDTH), Scaled(WIDTH)), (2, 5, 5)),
    "resnet": lambda: (DigitsResNet(4, 2), (1, 8, 8)),
    "pre-norm": lambda: (tokens(Attention(WIDTH, True), Feed(WIDTH)), (5, 4)),
    "post-norm": lambda: (tokens(Attention(WIDTH, False), Feed(WIDTH)), (5, 4)),
    "torch": lambda: (
        tokens(nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True, norm_first=True)), (5, 4)
    ),
}  # fmt: skip
#: What each of them can lose.
FOUND = {
    "basic": ["3", "4", "5"],
    "inverted": ["3", "4"],
    "scaled": ["3", "4.bn2", "5"],  # behind what is no ReLU a block's own ReLU has to stay
    "resnet": ["blocks.0", "blocks.1", "blocks.3", "blocks.5"],
    "pre-norm": ["1", "2"],
    "post-norm": ["1.drop", "2"],
    "torch": ["1.dropout1", "1.dropout2"],
}


def built(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(len(kind))
    model, shape = KINDS[kind]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return model.to(dtype), torch.randn(6, *shape, dtype=dtype)


def weaken(model: nn.Module, kind: str) -> None:
    """Let the branch of the second block add next to nothing."""
    last = model.get_submodule({"basic": "4.bn2", "scaled": "4.bn2", "pre-norm": "2.down"}[kind])
    with torch.no_grad():
        last.weight.mul_(1e-4), last.bias.mul_(1e-4)


def step(model, optimizer, x, pruner=None):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    record = pruner.step() if pruner else None
    optimizer.step()
    return loss.item(), record


def make(model, x, criterion="taylor_fo_gate", **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-3)
    given = {"params": 0.4, "every": 1, "per_step": 0.25} | options
    return optimizer, Pruner(model, x[:2], criterion, blocks=True, optimizer=optimizer, **given)

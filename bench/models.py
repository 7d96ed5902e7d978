"""ResNet-18 and ResNet-50 (He et al., 2016; strides on the 3x3 convolutions), and a ConvNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.shapes import EXPANSION, RESNET50_STAGES


def _conv(before: int, after: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(after),
    )


class Block(nn.Module):
    """Convolutions with a shortcut past them, projected where the shape changes."""

    def __init__(self, before: int, widths: list[int], kernels: list[int], stride: int) -> None:
        super().__init__()
        sizes = [before, *widths]
        strided = kernels.index(3)
        self.convs = nn.ModuleList(
            _conv(sizes[i], sizes[i + 1], kernel, stride if i == strided else 1)
            for i, kernel in enumerate(kernels)
        )
        same = before == widths[-1] and stride == 1
        self.shortcut = nn.Identity() if same else _conv(before, widths[-1], 1, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs[:-1]:
            y = self.relu(conv(y))
        return self.relu(self.convs[-1](y) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem of 7x7 and max pooling, four stages, average pooling and a linear layer."""

    def __init__(self, stages: tuple[tuple[int, int], ...], *, bottleneck: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)
        )
        blocks: list[nn.Module] = []
        before = 64
        for stage, (width, count) in enumerate(stages):
            widths = [width, width, width * EXPANSION] if bottleneck else [width, width]
            kernels = [1, 3, 1] if bottleneck else [3, 3]
            for block in range(count):
                stride = 2 if block == 0 and stage > 0 else 1
                blocks.append(Block(before, widths, kernels, stride))
                before = widths[-1]
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(before, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.blocks(self.stem(x)))
        return self.classifier(torch.flatten(x, 1))


def resnet18() -> ResNet:
    return ResNet(((64, 2), (128, 2), (256, 2), (512, 2)), bottleneck=False)


def resnet50() -> ResNet:
    return ResNet(RESNET50_STAGES, bottleneck=True)


class ConvNet(nn.Sequential):
    """3x3 convolutions for 32x32 images, pooled before each new width: 2.23 M parameters.

    Without normalisation and in-place operations, so that tools which refuse them can take part.
    """

    def __init__(self, widths: tuple[int, ...] = (64,) * 3 + (128,) * 3 + (256,) * 2 + (384,)):
        layers: list[nn.Module] = []
        side = 32
        for before, width in zip((3, *widths), widths, strict=False):
            if layers and before != width:
                layers.append(nn.MaxPool2d(2))
                side //= 2
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
        pooled = [nn.MaxPool2d(2), nn.Flatten()]
        super().__init__(*layers, *pooled, nn.Linear(widths[-1] * (side // 2) ** 2, 10))

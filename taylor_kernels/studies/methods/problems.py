"""The networks and data that methods are tried on: LeNets, and a residual network, of two tasks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from torch import nn

from taylor_kernels.studies.data import CLASSES, Split, load_digits
from taylor_kernels.studies.mnist1d import load_mnist1d
from taylor_kernels.studies.networks import DigitsResNet


class Data(Protocol):
    """A training and a test split of images [N, 1, H, W]."""

    @property
    def train(self) -> Split: ...
    @property
    def test(self) -> Split: ...


class LeNet300(nn.Sequential):
    """LeNet-300-100 (LeCun et al. 1998) for images [N, 1, H, W]: two hidden layers, no norm.

    Both are `width` times as wide.
    """

    def __init__(self, image: Sequence[int], width: int = 1) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(image[-2] * image[-1], 300 * width),
            nn.ReLU(),
            nn.Linear(300 * width, 100 * width),
            nn.ReLU(),
            nn.Linear(100 * width, CLASSES),
        )


class LeNet5(nn.Sequential):
    """LeNet-5 as in Caffe: convolutions of 20 and 50 filters, 500 neurons, no norm.

    Kernels of 5 pixels, with padding, along sides of more than one pixel, which the two poolings
    halve. All are `width` times as wide.
    """

    def __init__(self, image: Sequence[int], width: int = 1) -> None:
        height, length = image[-2:]
        kernel = (5 if height > 1 else 1, 5)
        padding = (kernel[0] // 2, 2)
        pool = (2 if height > 1 else 1, 2)
        pixels = max(height // 4, 1) * (length // 4)
        super().__init__(
            nn.Conv2d(1, 20 * width, kernel, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(pool),
            nn.Conv2d(20 * width, 50 * width, kernel, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(pool),
            nn.Flatten(),
            nn.Linear(50 * width * pixels, 500 * width),
            nn.ReLU(),
            nn.Linear(500 * width, CLASSES),
        )


class DeepMlp(nn.Sequential):
    """Eight hidden layers of 100 neurons with norms, without biases, for images [N, 1, H, W]: a
    network of which a criterion can starve single layers."""

    def __init__(self, image: Sequence[int]) -> None:
        widths = [image[-2] * image[-1], *[100] * 8]
        layers = [
            (nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU())
            for before, after in itertools.pairwise(widths)
        ]
        hidden = [module for layer in layers for module in layer]
        super().__init__(nn.Flatten(), *hidden, nn.Linear(widths[-1], CLASSES))


def with_norms(make: Callable[[Sequence[int]], nn.Sequential], image: Sequence[int]) -> nn.Module:
    """A network with BatchNorm before each ReLU, without weight and bias: of such layers scale and
    sign of the weights are all that there is."""
    modules: list[nn.Module] = []
    for module in make(image):
        before = modules[-1] if modules else None
        if isinstance(module, nn.ReLU) and isinstance(before, nn.Conv2d):
            modules.append(nn.BatchNorm2d(before.out_channels, affine=False))
        elif isinstance(module, nn.ReLU) and isinstance(before, nn.Linear):
            modules.append(nn.BatchNorm1d(before.out_features, affine=False))
        modules.append(module)
    return nn.Sequential(*modules)


def _resnet(image: Sequence[int]) -> nn.Module:
    return DigitsResNet()


def _deep_resnet(image: Sequence[int]) -> nn.Module:
    return DigitsResNet(width=12, blocks=5)


#: Name -> what makes it for images of a shape.
NETWORKS: dict[str, Callable[[Sequence[int]], nn.Module]] = {
    "LeNet-300-100": LeNet300,
    "LeNet-5": LeNet5,
    "MLP of eight layers": DeepMlp,
    "LeNet-600-200 with norms": partial(with_norms, partial(LeNet300, width=2)),
    "LeNet-5, 2× wide, with norms": partial(with_norms, partial(LeNet5, width=2)),
    "ResNet": _resnet,
    "ResNet, deep": _deep_resnet,
}
#: Name -> what loads it, shuffled or drawn by a seed.
DATA: dict[str, Callable[[int], Data]] = {"digits": load_digits, "MNIST-1D": load_mnist1d}

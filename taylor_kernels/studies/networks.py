"""Small networks for the digits: plain ones and residual ones, with norms in the usual places."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from taylor_kernels.studies.data import CLASSES, IMAGE_SHAPE


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to the input or to a 1x1 projection of it."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsResNet(nn.Module):
    """Three stages of `width`, 2·`width` and 4·`width` channels, `blocks` residual blocks each.

    A stage's blocks add to one shared stream, so their output filters can only go together; stages
    two and three change the stream's width and size through a 1x1 convolution.

    Takes [N, 1, 8, 8] and gives logits [N, 10].

    Raises:
        ValueError: `width` or `blocks` is below 1.
    """

    def __init__(self, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        if width < 1 or blocks < 1:
            raise ValueError(f"width, blocks: must be at least 1, got {width} and {blocks}")
        self.stem = nn.Sequential(
            nn.Conv2d(IMAGE_SHAPE[0], width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        stages, channels = [], width
        for stage in range(3):
            out, stride = width << stage, 1 if stage == 0 else 2
            for block in range(blocks):
                stages.append(Block(channels, out, stride if block == 0 else 1))
                channels = out
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


class PreActivationBlock(nn.Module):
    """Norm, ReLU and 3x3 convolution, twice, added to the input or to a 1x1 projection of it."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.conv2(F.relu(self.bn2(self.conv1(y))))


class DigitsPreActivation(nn.Module):
    """Three pre-activation blocks (He et al. 2016) of `width`, 2·`width` and 4·`width` channels.

    The streams between blocks are read through norms alone, a different one in each block.

    Takes [N, 1, 8, 8] and gives logits [N, 10].
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(IMAGE_SHAPE[0], width, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(
            PreActivationBlock(width, width, 1),
            PreActivationBlock(width, 2 * width, 2),
            PreActivationBlock(2 * width, 4 * width, 2),
        )
        self.norm = nn.BatchNorm2d(4 * width)
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.blocks(self.stem(x)))).mean(dim=(2, 3)))


class DigitsReluNorm(nn.Sequential):
    """`DigitsCnn` with BatchNorm behind the ReLU, and behind the pooling, not in front.

    Takes [N, 1, 8, 8] and gives logits [N, 10].
    """

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(IMAGE_SHAPE[0], 16, 3, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(16),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(32),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(48),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(48, CLASSES),
        )


class DigitsCnn(nn.Sequential):
    """Three 3x3 convolutions of 16, 32 and 48 filters with BatchNorm, and a linear classifier.

    Takes [N, 1, 8, 8] and gives logits [N, 10].
    """

    def __init__(self) -> None:
        def block(channels_in: int, channels_out: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(channels_out), nn.ReLU()]

        super().__init__(
            *block(IMAGE_SHAPE[0], 16),
            *block(16, 32),
            nn.MaxPool2d(2),
            *block(32, 48),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(48, CLASSES),
        )

"""Kernels that code makes or repeats, kernels of one place, and places that a pooling took."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taylor_kernels.tracing import trace
from tests.zoo import judging
from tests.zoo.structures import Run, conv

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def binomial(dims: int) -> Tensor:
    """A blur [1, 1, 3, ...]."""
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    whole = kernel
    for _ in range(dims - 1):
        whole = whole[..., None] * kernel
    return whole[None, None]


class Blur(nn.Module):
    """A kernel that is the same for every channel, in some way of writing it."""

    def __init__(self, way: str, dims: int, channels: int) -> None:
        super().__init__()
        self.way, self.dims, self.channels = way, dims, channels
        self.register_buffer("kernel", binomial(dims))

    def forward(self, x: Tensor) -> Tensor:
        count, kernel = x.size(1), self.kernel
        if self.way == "repeated by an attribute":
            count = self.channels
        if self.way == "made by code":
            kernel = binomial(self.dims).repeat(count, *[1] * (self.dims + 1)).to(x)
        elif self.way == "a box":
            kernel = torch.ones(count, 1, *[3] * self.dims, dtype=x.dtype) / 3**self.dims
        elif self.way == "expanded":
            kernel = kernel.expand(count, *[-1] * (self.dims + 1))
        else:
            kernel = kernel.repeat(count, *[1] * (self.dims + 1))
        if self.way == "transposed":
            return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=count)
        return CONVOLVE[self.dims](x, kernel, stride=2, padding=1, groups=count)


WAYS = ["made by code", "a box", "expanded", "repeated", "repeated by an attribute", "transposed"]


@pytest.mark.parametrize(
    ("way", "dims"), [*[(way, 2) for way in WAYS], ("repeated", 1), ("a box", 3)]
)
def test_channels_go_though_code_blurs_each_with_one_kernel(way, dims):
    torch.manual_seed(len(way))
    layer = LAYERS[dims]
    model = Run(
        lambda self, x: self.leave(self.two(self.blur(self.one(x).tanh())).flatten(2).mean(2)),
        one=layer(3, 9, 3), blur=Blur(way, dims, 9), two=layer(9, 7, 1), leave=nn.Linear(7, 2),
    )  # fmt: skip
    judging.check_all_but(["leave"], model, torch.randn(1, 3, *[6] * dims))


def test_kernels_that_code_makes_unlike_are_of_a_fixed_width():
    """Each channel has its own: which is whose is said by its number."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        kernel = torch.arange(1.0, 9.0).view(8, 1, 1, 1).to(x).expand(8, 1, 3, 3)
        return self.leave(F.conv2d(self.enter(x), kernel, groups=8).mean((2, 3)))

    model = Run(forward, enter=conv(3, 8), leave=nn.Linear(8, 2))
    channels = trace(model, torch.randn(1, 3, 6, 6))
    assert "fixed width" in channels.skipped["enter.0"]


def mixer(mix: nn.Module, halves: int = 1) -> nn.Module:
    """Tokens are mixed by a convolution in which channels are places."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = F.gelu(self.enter(x))
        parts = y.chunk(halves, -1)
        y = parts[0] * self.mix(self.norm(parts[-1]))[..., : parts[0].shape[-1]]
        return self.leave(self.down(y).mean(1))

    return Run(
        forward, enter=nn.Linear(4, 12 * halves), norm=nn.LayerNorm(12), mix=mix,
        down=nn.Linear(12, 7), leave=nn.Linear(7, 2),
    )  # fmt: skip


ALONE = {
    "of one place": nn.Conv1d(5, 5, 1),
    "without a bias": nn.Conv1d(5, 5, 1, bias=False),
    "padded to the same": nn.Conv1d(5, 5, 1, padding="same"),
    "dilated": nn.Conv1d(5, 5, 1, dilation=3),
    "two layers": nn.Sequential(nn.Conv1d(5, 8, 1), nn.GELU(), nn.Conv1d(8, 5, 1)),
}


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("mix", ALONE.values(), ids=ALONE)
def test_places_that_a_kernel_of_one_place_leaves_alone_go(mix, halves):
    """gMLP's gating and MLP-Mixer's tokens. The last layer over tokens makes what cannot go."""
    torch.manual_seed(halves)
    last = "mix" if isinstance(mix, nn.Conv1d) else "mix.2"
    judging.check_all_but([last, "leave"], mixer(mix, halves), torch.randn(1, 5, 4))


MIXED = {
    "three places": nn.Conv1d(5, 5, 3, padding=1),
    "padding": nn.Conv1d(5, 5, 1, padding=2),
    "a stride": nn.Sequential(nn.Conv1d(5, 5, 1, stride=2), nn.Upsample(scale_factor=2)),
}


@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
def test_places_that_a_convolution_moves_stay(mix):
    channels = trace(mixer(mix), torch.randn(1, 5, 4))
    assert {"enter", "leave"} <= channels.skipped.keys()
    assert "is mixed" in channels.skipped["enter"]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("between", [True, False])
def test_what_is_put_where_a_pooling_took_it_from_goes_with_the_indices(dims, between):
    """SegNet's and ENet's: the decoder has as many channels as the encoder where they meet."""
    pool, unpool = (F.max_pool2d, F.max_unpool2d) if dims == 2 else (F.max_pool3d, F.max_unpool3d)
    layer = LAYERS[dims]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x, first = pool(self.one(x), 2, return_indices=True)
        y, second = pool(self.two(x).tanh(), 2, return_indices=True)
        y = self.three(y) if between else y
        y = unpool(self.four(unpool(y, second, 2)), first, 2)
        return self.leave(y).flatten(2).mean(2)

    torch.manual_seed(dims)
    model = Run(
        forward, one=layer(3, 6, 3, padding=1), two=layer(6, 8, 3, padding=1),
        **({"three": layer(8, 8, 3, padding=1)} if between else {}),
        four=layer(8, 6, 3, padding=1), leave=layer(6, 2, 1),
    )  # fmt: skip
    judging.check_all_but(["leave"], model, torch.randn(1, 3, *[8] * dims))

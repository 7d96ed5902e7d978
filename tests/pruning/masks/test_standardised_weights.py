"""Layers that compute what they multiply by of their whole weight: weights standardised over their
inputs, by functions or by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taylor_kernels as tk


def by_batch_norm(layer: nn.Module) -> Tensor:
    weight = layer.weight
    gain = (layer.gain * layer.scale).view(-1)
    outputs = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
    rows = weight.reshape(1, outputs, -1)
    return F.batch_norm(rows, None, None, gain, training=True, momentum=0.0).reshape_as(weight)


def by_hand(layer: nn.Module) -> Tensor:
    weight = layer.weight
    dims = tuple(range(1, weight.dim()))
    variance, mean = torch.var_mean(weight, dims, unbiased=False, keepdim=True)
    return (weight - mean) / torch.sqrt(variance + 1e-8)


def by_layer_norm(layer: nn.Module) -> Tensor:
    weight = layer.weight
    return F.layer_norm(weight.flatten(1), weight.flatten(1).shape[1:]).view_as(weight)


def by_rows_greatest(layer: nn.Module) -> Tensor:
    """Quantised in steps of its row's greatest entry, whose gradient passes by."""
    weight = layer.weight
    step = (weight - 1).flatten(1).amax(1).reshape(-1, *[1] * (weight.dim() - 1))
    return weight / (step.abs() + 0.1)


WAYS: dict[str, Callable[[nn.Module], Tensor]] = {
    "batch norm": by_batch_norm,
    "by hand": by_hand,
    "layer norm": by_layer_norm,
    "greatest": by_rows_greatest,
}


class Conv(nn.Conv2d):
    """A convolution whose weight is worked out anew in each pass."""

    def __init__(self, way: str, inputs: int, outputs: int, kernel: int = 3, groups: int = 1):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, groups=groups)
        self.way, self.scale = way, self.weight[0].numel() ** -0.5
        self.gain = nn.Parameter(torch.rand(outputs, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = WAYS[self.way](self) * self.gain
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, 1, self.groups)


class Linear(nn.Linear):
    """The same of a linear layer."""

    def __init__(self, way: str, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.way, self.scale = way, inputs**-0.5
        self.gain = nn.Parameter(torch.rand(outputs, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, WAYS[self.way](self), self.bias)


class Net(nn.Module):
    """Residual blocks without norms, as wide inside as the stream or not; one of groups."""

    def __init__(self, way: str, width: int, inner: int) -> None:
        super().__init__()
        self.enter = Conv(way, 3, width)
        self.first = nn.ModuleList(Conv(way, width, inner, 1) for _ in range(2))
        self.middle = nn.ModuleList(
            [Conv(way, inner, inner), Conv(way, inner, inner, groups=inner // 2)]
        )
        self.last = nn.ModuleList(Conv(way, inner, width, 1) for _ in range(2))
        self.mix, self.leave = Linear(way, width, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for first, middle, last in zip(self.first, self.middle, self.last, strict=True):
            x = x + last(F.gelu(middle(F.gelu(first(F.gelu(x))))))
        return self.leave(F.gelu(self.mix(x.mean((2, 3)))))


def outputs(model: nn.Module, x: Tensor, training: bool) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).double().train(training)(x.double())


@pytest.mark.parametrize(("width", "inner"), [(12, 8), (8, 8)])
@pytest.mark.parametrize("way", WAYS)
def test_masked_is_removed_and_training_goes_on(way, width, inner):
    model = Net(way, width, inner)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    pruner = tk.Pruner(
        model, torch.randn(1, 3, 6, 6), "taylor_fo", params=0.5, every=1, per_step=3,
        optimizer=optimizer,
    )  # fmt: skip
    assert set(pruner.skipped) == {"leave"}
    while not pruner.done:
        model(torch.randn(4, 3, 6, 6)).square().sum().backward()
        pruner.step()
        optimizer.step()
        optimizer.zero_grad()
    x = torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        model(x)
    masked = [outputs(model, x, training) for training in (False, True)]
    pruner.compact()
    for training in (False, True):
        torch.testing.assert_close(
            outputs(model, x, training), masked[training], rtol=1e-10, atol=1e-10
        )
    model(x).square().sum().backward()
    optimizer.step()
    assert model(x).isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_statistics_are_of_the_inputs_that_are_kept(way):
    """The definition, by a layer that was made of these inputs."""
    first, second = Conv(way, 3, 8), Conv(way, 8, 5)
    model = nn.Sequential(first, nn.ReLU(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    pruner = tk.Pruner(
        model, torch.randn(1, 3, 6, 6), "magnitude_l2", filters=0.6, every=1, per_step=1
    )
    while not pruner.done:
        pruner.step()
    kept = first.weight.flatten(1).any(1).nonzero().flatten()
    assert 2 <= len(kept) < 8
    small = Conv(way, len(kept), 5)
    small.scale = second.scale
    with torch.no_grad():
        small.weight.copy_(second.weight[:, kept])
        small.bias.copy_(second.bias)
        small.gain.copy_(second.gain)
    x = torch.randn(2, 3, 6, 6)
    expected = small(first(x)[:, kept].relu()).mean((2, 3))
    torch.testing.assert_close(model(x), expected)
    second.weight.grad = None
    model(x).square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(second.weight.grad[:, kept], small.weight.grad)


class AllOver(nn.Conv2d):
    """Centred by the mean of all of its entries: a filter at zero counts in that of the others."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


def test_filters_that_count_in_the_statistics_of_others_stay():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), AllOver(6, 7, 3), nn.ReLU(), nn.Conv2d(7, 2, 3)
    )
    pruner = tk.Pruner(model, torch.randn(1, 3, 8, 8), "magnitude_l2", filters=0.7)
    assert "2" in pruner.skipped
    assert "mixed" in pruner.skipped["2"]

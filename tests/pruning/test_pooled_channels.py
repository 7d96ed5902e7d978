"""Modules that pool channels to a mean, a maximum and the like, as CBAM's spatial attention."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import taylor_kernels as tk

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(1, keepdim=True),
    "max": lambda x: x.max(1, keepdim=True)[0],
    "torch.max": lambda x: torch.max(x, 1)[0].unsqueeze(1),
    "amin": lambda x: x.amin(1, keepdim=True),
    "amax of absolutes": lambda x: x.abs().amax(dim=1, keepdim=True),
    "std": lambda x: x.std(1, keepdim=True),
    "sum": lambda x: (x + 1).sum(1, keepdim=True),
    "norm": lambda x: (x - 1).norm(dim=1, keepdim=True),
    "range": lambda x: torch.sub(*reversed(torch.aminmax(x, dim=1, keepdim=True))),
    "logsumexp": lambda x: x.logsumexp(1, keepdim=True),
}


class Pool(nn.Module):
    """Pools the channels: no parameters, as many channels out as there are kinds of pooling."""

    def __init__(self, pools: list[str]) -> None:
        super().__init__()
        self.pools = pools

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([POOLS[name](x) for name in self.pools], 1)


class Gate(nn.Module):
    """Where in the image to look: of its pools, in its own code or a module's, by a convolution."""

    def __init__(self, pools: list[str], own: bool, multiplies: bool) -> None:
        super().__init__()
        self.pools, self.multiplies = pools, multiplies
        self.pool = None if own else Pool(pools)
        self.conv = nn.Conv2d(len(pools), 1, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(1)
        self.weights = nn.Parameter(torch.rand(7))  # as many as there are channels at some time

    def forward(self, x: Tensor) -> Tensor:
        y = Pool.forward(self, x) if self.pool is None else self.pool(x)
        y = y * self.weights.softmax(0)[: y.size(1), None, None]
        gate = self.norm(self.conv(y)).sigmoid()
        return x * gate if self.multiplies else gate


class Net(nn.Module):
    """Residual blocks, each with a gate at its end."""

    def __init__(self, pools: list[str], own: bool, multiplies: bool, signed: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10))
        self.convs = nn.ModuleList(nn.Conv2d(10, 10, 3, padding=1) for _ in range(2))
        self.gates = nn.ModuleList(Gate(pools, own, multiplies) for _ in range(2))
        self.leave, self.signed = nn.Linear(10, 3), signed

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for conv, gate in zip(self.convs, self.gates, strict=True):
            y = conv(x.relu())
            y = y.tanh() if self.signed else y.relu()
            x = x + (gate(y) if gate.multiplies else y * gate(y))
        return self.leave(x.mean((2, 3)))


def nets() -> st.SearchStrategy[Net]:
    pools = st.lists(st.sampled_from(sorted(POOLS)), min_size=1, max_size=3, unique=True)
    return st.builds(Net, pools, st.booleans(), st.booleans(), st.booleans())


@given(net=nets(), seed=st.integers(0, 2**31))
@settings(max_examples=12)
def test_masked_is_removed_in_evaluation_and_in_training(net, seed):
    torch.manual_seed(seed)
    net, x = net.double(), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    for parameter in net.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    # Kept: else there may be nothing but one convolution's own filters to choose.
    pruner = tk.Pruner(net, x[:1], "random", filters=0.5, every=1, per_step=2)
    assert {"enter.0", "convs.0", "convs.1"} <= pruner.widths.keys()
    while not pruner.done:
        net(x).square().sum().backward()
        pruner.step()
    assert pruner.widths["enter.0"] < 10
    small, masked = copy.deepcopy(net), copy.deepcopy(net)
    pruner.compact()
    for _ in range(2):
        torch.testing.assert_close(net(x), masked(x), rtol=1e-10, atol=1e-10)
    for gate, other in zip(net.gates, masked.gates, strict=True):
        torch.testing.assert_close(gate.norm.running_mean, other.norm.running_mean)
        assert gate.norm.num_batches_tracked == other.norm.num_batches_tracked
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), masked.eval()(x), rtol=1e-10, atol=1e-10)
    assert small.enter[0].weight.size(0) == 10
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    net.train()(x).square().sum().backward()
    optimizer.step()


def test_the_pools_are_of_the_channels_that_are_kept():
    """The definition, by hand: negative channels, among which a zero would be the greatest."""
    model = nn.Sequential(nn.Linear(4, 8), Pool(["max", "mean"]), nn.Linear(2, 3)).double()
    model[0].bias.data -= 20
    x = torch.randn(6, 4, dtype=torch.float64)
    pruner = tk.Pruner(model, x[:1], "random", filters=0.5, every=1, per_step=4)
    model(x).square().sum().backward()
    pruner.step()
    kept = model[0].weight.any(dim=1).nonzero().flatten()
    assert 2 <= len(kept) < 8
    y = model[0](x)[:, kept]
    expected = model[2](torch.stack([y.amax(1), y.mean(1)], 1))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(pruner.compact()(x), expected)


class Twice(nn.Module):
    """One module that pools channels of two widths: no hook of it knows which."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(4, 6)
        self.pool, self.leave = Pool(["max"]), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.pool(self.one(x)), self.pool(self.two(x))], 1)
        return self.leave(F.relu(y))


class Inside(nn.Module):
    """A layer of the same channels stands beside the pool: it would be run on some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(x) * x.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("model", "stays"),
    [
        (Twice, {"one", "two"}),
        (lambda: nn.Sequential(nn.Linear(4, 8), Inside(), nn.Linear(8, 3)), {"0"}),
    ],
)
def test_what_no_hook_can_run_on_the_kept_channels_stays(model, stays):
    channels = tk.trace(model(), torch.randn(2, 4))
    assert stays <= channels.skipped.keys()
    assert all("is mixed with other channels" in channels.skipped[name] for name in stays)


@pytest.mark.parametrize("mode", ["images", "tokens"])
def test_norms_without_parameters_and_of_several_dimensions(mode):
    """DiT's norms have no weight, GCNet's go by (channels, 1, 1)."""
    torch.manual_seed(0)
    if mode == "tokens":
        norms = [
            nn.LayerNorm(12, elementwise_affine=False),
            nn.RMSNorm(12, elementwise_affine=False),
        ]
        layers = [nn.Linear(4, 12), norms[0], nn.Linear(12, 12), norms[1], nn.Linear(12, 3)]
        x = torch.randn(5, 7, 4)
    else:
        norm = nn.LayerNorm([12, 1, 1])
        layers = [nn.Conv2d(4, 12, 1), norm, nn.ReLU(), nn.Conv2d(12, 3, 1)]
        x = torch.randn(5, 4, 1, 1)
    model, x = nn.Sequential(*layers).double(), x.double()
    pruner = tk.Pruner(model, x[:1], "random", filters=0.5, every=1, per_step=4)
    assert set(pruner.skipped) == {str(len(layers) - 1)}
    while not pruner.done:
        model(x).square().sum().backward()
        pruner.step()
    masked = model(x)
    torch.testing.assert_close(pruner.compact()(x), masked, rtol=1e-10, atol=1e-10)
    shape = model[1].normalized_shape
    assert shape[0] == model[0].weight.size(0) < 12
    assert shape[1:] == layers[1].normalized_shape[1:]

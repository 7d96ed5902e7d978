"""Layers whose weight is computed: asked about without being computed, and copied."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import taylor_kernels as tk


def network(first):
    return nn.Sequential(first, nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).train()


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_gate", "magnitude_l2", "random"])
def test_a_spectral_norm_takes_no_step_but_those_of_the_models_own_passes(criterion):
    model = network(spectral_norm(nn.Linear(4, 8)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruner = tk.Pruner(model, torch.randn(2, 4), criterion, filters=0.8, every=2, per_step=1)
    meter = tk.Importance(model, "magnitude_l2")
    meter.update()
    after = model.state_dict()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    meter.close()
    pruner.close()


def test_the_old_weight_norm_prunes_by_its_gates():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch has deprecated it
        model = network(nn.utils.weight_norm(nn.Linear(4, 8)))
    x = torch.randn(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(x).sum().backward()  # leaves a weight that has a graph
    pruner = tk.Pruner(
        model, x, "taylor_fo_gate", filters=0.5, every=1, per_step=2, optimizer=optimizer
    )
    while not pruner.done:
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        pruner.step()
        optimizer.step()
    masked = model(x).detach()
    pruner.compact()
    torch.testing.assert_close(model(x).detach(), masked)
    assert pruner.widths["0"] == len(model[0].weight_v)


def prune_and_compact(pruner: tk.Pruner, model: nn.Module, x: Tensor) -> None:
    """To the target; the removed channels are those that were masked."""
    while not pruner.done:
        pruner.step()
    masked = model(x).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no optimizer
        pruner.compact()
    torch.testing.assert_close(model(x).detach(), masked, rtol=1e-4, atol=1e-5)


class LowRank(nn.Linear):
    """A linear layer (or a convolution of one place) and an update of low rank to its weight."""

    def __init__(self, inputs: int, outputs: int, rank: int, first: bool) -> None:
        super().__init__(inputs, outputs)
        self.up = nn.Parameter(torch.randn(outputs, rank))
        self.down, self.first = nn.Parameter(torch.randn(rank, inputs)), first

    def forward(self, x: Tensor) -> Tensor:
        update = self.up @ self.down
        weight = update + self.weight if self.first else self.weight + update
        return F.linear(x, weight, self.bias)


class LowRankConvolution(nn.Conv2d):
    def __init__(self, inputs: int, outputs: int, rank: int, first: bool) -> None:
        super().__init__(inputs, outputs, 1)
        self.up = nn.Parameter(torch.randn(outputs, rank))
        self.down, self.first = nn.Parameter(torch.randn(rank, inputs)), first

    def forward(self, x: Tensor) -> Tensor:
        update = (self.up @ self.down)[:, :, None, None]
        weight = update + self.weight if self.first else self.weight + update
        return F.conv2d(x, weight, self.bias)


@pytest.mark.parametrize("kind", [LowRank, LowRankConvolution])
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("first", [False, True])
def test_an_update_of_low_rank_to_a_layers_weight_loses_its_rows(kind, rank, first):
    torch.manual_seed(rank)
    model = nn.Sequential(
        kind(4, 8, rank, first), nn.Tanh(), kind(8, 6, rank, first), nn.Tanh(), kind(6, 2, 1, first)
    )
    x = torch.randn(2, 4, 3, 3) if kind is LowRankConvolution else torch.randn(2, 4)
    pruner = tk.Pruner(model, x, "magnitude_l2", filters=0.6, every=1, per_step=1)
    assert pruner.widths == {"0": 8, "2": 6}
    assert list(pruner.skipped) == ["4"]
    prune_and_compact(pruner, model, x)
    assert model[2].up.shape == (model[2].weight.shape[0], rank)


class Factors(nn.Module):
    """A weight that is a product of two parameters, and of nothing else."""

    def __init__(self, inputs: int, outputs: int, turned: bool) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(*((outputs, 3) if turned else (inputs, 3))))
        self.other = nn.Parameter(torch.randn(*((3, inputs) if turned else (3, outputs))))
        self.turned = turned

    def forward(self, x: Tensor) -> Tensor:
        weight = self.one @ self.other
        return F.linear(x, weight) if self.turned else x @ weight


@pytest.mark.parametrize("turned", [False, True])
def test_channels_of_a_weight_that_is_a_product_go(turned):
    model = nn.Sequential(
        Factors(4, 8, turned), nn.Tanh(), Factors(8, 6, turned), nn.Tanh(), nn.Linear(6, 2)
    )
    x = torch.randn(2, 4)
    pruner = tk.Pruner(model, x, "magnitude_l2", params=0.6, every=1, per_step=0.3)
    prune_and_compact(pruner, model, x)
    assert model(x).shape == (2, 2)
    outputs = model[0].one if turned else model[0].other.t()
    assert len(outputs) < 8


class Beside(nn.Linear):
    """A low-rank update beside the layer's own product, and before it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down = nn.Parameter(torch.randn(3, inputs))
        self.up = nn.Parameter(torch.randn(outputs, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down.T @ self.up.T + F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn"])
def test_an_update_that_runs_first_is_not_the_layer(criterion):
    widths = torch.randint(7, 12, (2,)).tolist()
    model = nn.Sequential(
        Beside(4, widths[0]), nn.ReLU(), Beside(*widths), nn.ReLU(), nn.Linear(widths[1], 2)
    ).double()
    pruner = tk.Pruner(
        model, torch.randn(5, 4).double(), criterion, filters=0.6, every=1, per_step=2
    )
    assert [pruner.widths[name] for name in ("0", "2")] == widths
    while not pruner.done:
        model.zero_grad()
        model(torch.randn(5, 4).double()).square().mean().backward()
        pruner.step()
    x = torch.randn(5, 4).double()
    masked = model(x).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no optimizer
        pruner.compact()
    torch.testing.assert_close(model(x).detach(), masked)


class Computed(nn.Linear):
    """Another function of its weight is what it multiplies by."""

    def __init__(self, function, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.function, self.unused = function, nn.Linear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.function(self.weight), self.bias)


class Around(nn.Module):
    """The same around a layer that is not called."""

    def __init__(self, *given) -> None:
        super().__init__()
        self.function, *sizes = given
        self.inner = nn.Linear(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.function(self.inner.weight), self.inner.bias)


@pytest.mark.parametrize("kind", [Computed, Around])
@pytest.mark.parametrize(
    ("operation", "function"),
    [
        ("bucketize", lambda w: torch.bucketize(w, torch.linspace(-1, 1, 9)).to(w)),
        ("linalg_matrix_exp", torch.linalg.matrix_exp),
        ("linalg_qr", lambda w: torch.linalg.qr(w)[0]),
    ],
)
def test_a_layer_says_what_stops_its_weight(kind, operation, function):
    """And one that is not run says that."""
    model = nn.Sequential(nn.Linear(4, 6), kind(function, 6, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(ValueError, match="nothing to prune") as told:
        tk.Pruner(model, torch.randn(3, 4), filters=0.9)
    name = "1" if kind is Computed else "1.inner"
    assert f"{name}: goes through an operation that is not known ({operation} in '1')" in str(
        told.value
    )
    unused = "1.unused: is not reached on the example inputs in eval mode" in str(told.value)
    assert unused == (kind is Computed)

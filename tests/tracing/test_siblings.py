"""Modules of a list that the example does not reach are followed as their siblings are."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import taylor_kernels as tk
from taylor_kernels.tracing import trace
from tests.zoo import judging


class Expert(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Mixture(nn.Module):
    """Each token goes to its best experts; experts that get none are not run."""

    def __init__(self, width: int, experts: int, best: int, *, named: bool) -> None:
        super().__init__()
        self.router, self.best = nn.Linear(width, experts), best
        each = [Expert(width, 2 * width) for _ in range(experts)]
        if named:
            self.experts: nn.Module = nn.ModuleDict({f"e{n}": e for n, e in enumerate(each)})
        else:
            self.experts = nn.ModuleList(each)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, numbers = self.router(tokens).softmax(-1).topk(self.best)
        found = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts.children()):
            token, place = torch.where(numbers == number)
            if token.numel():
                found.index_add_(0, token, expert(tokens[token]) * weights[token, place, None])
        return x + found.view_as(x)


def network(draw: random.Random) -> tuple[nn.Module, Tensor]:
    width, experts = draw.randint(6, 10), draw.randint(4, 7)
    layers = [
        Mixture(width, experts, draw.randint(1, 2), named=draw.random() < 0.5) for _ in range(2)
    ]
    norm = draw.choice([nn.LayerNorm(width), nn.Identity()])
    model = nn.Sequential(nn.Embedding(20, width), layers[0], norm, layers[1], nn.Linear(width, 3))
    return model, torch.randint(20, (1, 2))


@pytest.mark.parametrize("seed", range(4))
def test_experts_without_a_token_lose_channels_too(seed):
    torch.manual_seed(seed)
    model, tokens = network(random.Random(seed))
    judging.check_all_but(["1.router", "3.router", "4"], model, tokens)
    model(torch.randint(20, (5, 30)))  # every expert has tokens now
    for mixture in (model[1], model[3]):
        for expert in mixture.experts.children():
            assert expert.up.in_features == expert.down.out_features == model[0].embedding_dim


@pytest.mark.filterwarnings("ignore:.*not called in any pass")
@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_fo", "magnitude_l2"])
def test_they_are_scored_whichever_have_tokens(criterion):
    torch.manual_seed(0)
    model, tokens = network(random.Random(9))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    pruner = tk.Pruner(
        model, tokens, criterion, params=0.6, every=1, per_step=0.2, optimizer=optimizer
    )
    while not pruner.done:
        model(torch.randint(20, (1, 3))).square().mean().backward()
        pruner.step()
    pruner.compact()(torch.randint(20, (5, 30)))


class Choosing(nn.Module):
    """One of several branches, by a setting."""

    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches, self.active = nn.ModuleList(branches), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.branches[self.active](x)


def test_what_is_made_otherwise_is_no_sibling():
    torch.manual_seed(0)
    apart = Choosing([nn.Linear(8, 6), nn.Linear(8, 5)])
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), apart)
    assert "2.branches.1" not in trace(model, torch.randn(2, 4)).layers


def test_one_that_does_not_run_on_its_siblings_input_is_left():
    class Picky(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self is not model[2].branches[0]:
                raise ValueError("not for me")
            return super().forward(x)

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Choosing([Picky(8, 6), Picky(8, 6)]))
    assert trace(model, torch.randn(2, 4)).layers.keys() == {"0", "2.branches.0"}


class Gated(nn.Module):
    """A branch, of which some want more than others."""

    def __init__(self, width: int, *, more: bool) -> None:
        super().__init__()
        self.up, self.down, self.more = nn.Linear(width, 9), nn.Linear(9, width), more

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        hidden = self.up(x).tanh()
        if self.more:
            assert gate is not None
            hidden = hidden * gate
        return self.down(hidden)


class Optional(nn.Module):
    """Its second branch runs where a caller asks for it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, width), nn.Linear(width, 2)
        self.branches = nn.ModuleList([Gated(width, more=more) for more in (False, True)])

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = self.branches[0](self.enter(x))
        return self.leave(y if gate is None else self.branches[1](y, gate))


def test_one_that_fails_half_way_is_left_as_a_whole():
    model = Optional(7)
    pruner = tk.Pruner(model, torch.randn(2, 3), "random", params=0.85, every=1, per_step=2)
    assert set(pruner.widths).isdisjoint(["branches.1.up", "branches.1.down"])
    assert "not reached" in pruner.skipped["branches.1.up"]
    while not pruner.done:
        pruner.step()
    pruner.compact()
    other = model.branches[1]
    assert len(other.up.weight) == other.down.weight.shape[1] == 9


class First(nn.Module):
    """A network of some of its layers alone, or of residual ones."""

    def __init__(self, width: int, used: int) -> None:
        super().__init__()
        self.enter, self.leave, self.used = nn.Linear(3, width), nn.Linear(width, 2), used
        self.layers = nn.ModuleList(Expert(width, 2 * width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        for layer in self.layers[: self.used]:
            y = y + layer(y)
        return self.leave(y)


@pytest.mark.parametrize("used", [1, 3, 4])
@pytest.mark.parametrize("blocks", [False, True])
def test_what_the_example_does_not_reach_costs_nothing(used, blocks):
    model, x = First(6, used), torch.randn(5, 3)
    with FlopCounterMode(display=False) as counted:
        model(x)
    pruner = tk.Pruner(model, x, "magnitude_l2", flops=0.5, every=1, per_step=3, blocks=blocks)
    assert pruner.whole.flops == counted.get_total_flops()
    while not pruner.done:
        pruner.step()
    pruner.compact()
    with FlopCounterMode(display=False) as left:
        model(x)
    assert pruner.cost.flops == left.get_total_flops()

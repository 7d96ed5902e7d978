"""What a model divides by, or takes a logarithm or a root of, is masked with ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from taylor_kernels.pruning import Pruner
from taylor_kernels.tracing import trace
from tests.tracing.removal import faults

#: What is done to [N, C] features with a vector of positive numbers that the model holds.
DONE = {
    "divided": lambda x, s: x / s,
    "divided in place": lambda x, s: x.clone().div_(s),
    "times its inverse": lambda x, s: x * (1 / s),
    "its reciprocal": lambda x, s: x + s.reciprocal(),
    "its root": lambda x, s: x / s.sqrt(),
    "its inverse root": lambda x, s: x * (2 * s).rsqrt(),
    "its logarithm": lambda x, s: x.tanh() + s.log(),
    "a negative power": lambda x, s: x * s[None].pow(-2),
    "a positive power": lambda x, s: x * s**2,
    "standardised and back": lambda x, s: (x / s).relu() * s,
    "of [N, C, 1]": lambda x, s: (x[..., None] / s[:, None]).squeeze(2),
    "added": lambda x, s: torch.addcdiv(x, x.sigmoid(), s),
    "a rest": lambda x, s: x.fmod(s),
    "a likelihood": lambda x, s: torch.distributions.Normal(x, s).log_prob(x.detach() + 1),
}


class Divided(nn.Module):
    """Features between two layers, and what is done to them."""

    def __init__(self, width: int, kinds: list[str], learnt: bool) -> None:
        super().__init__()
        self.kinds = kinds
        self.enter, self.leave = nn.Linear(4, width), nn.Linear(width, 3)
        for number in range(len(kinds)):
            scale = torch.rand(width) + 1.0
            if learnt:
                self.register_parameter(f"scale{number}", nn.Parameter(scale))
            else:
                self.register_buffer(f"scale{number}", scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for number, kind in enumerate(self.kinds):
            x = DONE[kind](x, getattr(self, f"scale{number}"))
        return self.leave(x)


@settings(max_examples=12)
@given(
    st.integers(2, 9), st.lists(st.sampled_from(list(DONE)), min_size=1, max_size=3), st.booleans()
)
def test_all_channels_go_with_what_they_are_divided_by(width, kinds, learnt):
    model, x = Divided(width, kinds, learnt), torch.randn(3, 4)
    channels = trace(model, x)
    assert [group.size for group in channels.groups] == [width]
    assert not faults(model, x, channels, draws=1, every=False)


#: One number [N, 1] of the features and of the vector that they are divided by, elsewhere: ones
#: that stand in it where channels are masked would count.
COUNTED = {
    "their sum": lambda x, s: s.sum().expand(len(x), 1),
    "their norm": lambda x, s: s.norm().expand(len(x), 1),
    "a product of them": lambda x, s: (s @ (1 / s)).expand(len(x), 1),
    "the sum of features and them": lambda x, s: (x + s).sum(1, keepdim=True),
    "its square": lambda x, s: (x + s).square().sum(1, keepdim=True),
    "a product": lambda x, s: (s * x).sum(1, keepdim=True),
    "in rare rows": lambda x, s: torch.where(x[:, :1] > 9, x + s, x).sum(1, keepdim=True),
    "a distance": lambda x, s: torch.cdist(x, s[None]),
    "divided by its norm": lambda x, s: (x / (s / s.norm())).sum(1, keepdim=True),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", COUNTED)
def test_ones_do_not_count_elsewhere(kind, first):
    """They are met before the division, which says that they are ones, or behind it."""

    class Counted(Divided):
        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            one = COUNTED[kind](x, self.scale0) if first else None
            y = self.leave(x / self.scale0)
            return y + (COUNTED[kind](x, self.scale0) if one is None else one)

    model, x = Counted(6, ["divided"], False), torch.randn(3, 4)
    assert not faults(model, x, trace(model, x), draws=2, every=False)


class Normed(nn.Module):
    """Features whose masked channels have ones in a vector or matrix that the sum of one in rare
    examples reads."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.enter, self.leave = kind, nn.Linear(4, 7), nn.Linear(7, 3)
        self.norm = nn.BatchNorm1d(7)
        self.register_buffer("own", torch.rand(7) + 0.5)
        if kind == "weight norm":
            self.enter = weight_norm(self.enter)
        elif kind == "weight norm of inputs":
            self.leave = weight_norm(self.leave, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        if self.kind == "a norm's variances":
            y, ones = self.norm(y), self.norm.running_var
        elif self.kind == "variances of the model's own":
            y, ones = F.batch_norm(y, torch.zeros_like(self.own), self.own), self.own
        else:
            layer = self.enter if self.kind == "weight norm" else self.leave
            ones = layer.parametrizations.weight.original1
        return torch.where(x[:, :1] > 1e3, ones.sum(), self.leave(y.relu()))


@pytest.mark.parametrize(
    "kind",
    ["a norm's variances", "variances of the model's own", "weight norm", "weight norm of inputs"],
)
def test_ones_of_norms_do_not_count_in_rare_examples(kind):
    model, x = Normed(kind), torch.randn(3, 4)
    rare = torch.cat([x, 2e3 * torch.ones(2, 4)])
    channels = trace(model, x)
    assert not faults(model, rare, channels, draws=2, every=False)
    assert "enter" in channels.skipped


@pytest.mark.parametrize("kind", DONE)
def test_a_pruner_offers_them(kind):
    model, x = Divided(8, [kind], False), torch.randn(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    pruner = Pruner(model, x, "magnitude_l2", filters=0.5, every=1, optimizer=optimizer)
    assert list(pruner.skipped) == ["leave"]
    while not pruner.done:
        pruner.step()
    before = model.eval()(x)
    assert before.isfinite().all()
    torch.testing.assert_close(pruner.compact()(x), before, rtol=1e-4, atol=1e-5)


def test_what_keeps_its_zeros_is_masked_with_zeros():
    """Far from zero with a constant, or a power of a number: such an operand may be zero."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 3)
            self.register_buffer("scale", torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x) / (self.scale + 1e-5)
            return self.leave(x * (self.scale + 0.5).rsqrt() / self.scale.exp())

    channels = trace(Shifted(), torch.randn(2, 4))
    assert channels.fills == {}
    assert not faults(Shifted(), torch.randn(2, 4), channels)

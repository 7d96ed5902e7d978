"""Noise that code makes follows the width of what it meets, as in variational autoencoders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Gamma, Independent, Laplace, LogNormal, Normal, Poisson

from taylor_kernels.pruning import Pruner
from taylor_kernels.pruning.proof.steady_noise import SteadyNoise
from tests.tracing.parts import Apply

#: Of the module, means and deviations, a draw.
DRAWN = {
    "rsample": lambda s, m, d: Normal(m, d).rsample(),
    "several": lambda s, m, d: Normal(m, d).rsample((3,)).mean(0),
    "sample": lambda s, m, d: Normal(m, d).sample() + m,
    "independent": lambda s, m, d: Independent(Normal(m, d), 1).rsample(),
    "lognormal": lambda s, m, d: LogNormal(m.tanh(), d.tanh()).rsample(),
    "laplace": lambda s, m, d: Laplace(m, d).rsample(),
    "gamma": lambda s, m, d: Gamma(m.exp(), d).sample(),
    "poisson": lambda s, m, d: Poisson(m.exp() + d).sample(),
    "of its size": lambda s, m, d: m + d * torch.randn(m.size(), dtype=m.dtype),
    "uniform": lambda s, m, d: m + d * torch.rand(*m.shape, dtype=m.dtype),
    "of an attribute": lambda s, m, d: m + d * torch.randn(len(m), s.latent, dtype=m.dtype),
    "of means": lambda s, m, d: torch.normal(m, d),
    "in place": lambda s, m, d: m + d * torch.empty_like(d).normal_(),
    "new": lambda s, m, d: m + d * d.data.new(d.size()).normal_(),
    "made in float": lambda s, m, d: m + d * torch.FloatTensor(d.size()).normal_().to(d),
    "ones of an attribute": lambda s, m, d: m * torch.ones(s.latent, dtype=m.dtype) + d,
}


def autoencoder(draw, width: int) -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.enter(x).tanh()
        return self.leave(draw(self, self.mean(y), self.deviation(y).exp()))

    model = Apply(
        forward, enter=nn.Linear(5, 8), mean=nn.Linear(8, width), deviation=nn.Linear(8, width),
        leave=nn.Linear(width, 5),
    )  # fmt: skip
    model.latent = width
    return model


@pytest.mark.parametrize("name", DRAWN)
def test_a_latent_goes_with_its_noise(name):
    model = autoencoder(DRAWN[name], 7).eval()
    x = torch.randn(3, 5)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    options = {"filters": 0.5, "every": 1, "ignore": ["enter"], "optimizer": optimizer}
    pruner = Pruner(model, x, "magnitude_l2", **options)
    assert set(pruner.skipped) == {"enter", "leave"}
    while not pruner.done:
        pruner.step()
    with SteadyNoise():
        before = model(x)
        after = pruner.compact()(x)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert model.mean.out_features == model.deviation.out_features < 7
    assert model(x).shape == (3, 5)


def test_a_width_that_is_written_down_keeps_what_it_meets():
    def draw(s, mean, deviation):
        return mean + deviation * torch.randn(len(mean), 7, dtype=mean.dtype)

    pruner = Pruner(autoencoder(draw, 7), torch.randn(3, 5), "magnitude_l2", filters=0.9)
    assert set(pruner.skipped) == {"mean", "deviation", "leave"}


def test_noise_on_which_the_proof_stands_still_says_where_it_is_drawn():
    mean, deviation = torch.randn(3, 4), torch.rand(3, 4)
    with SteadyNoise():
        torch.testing.assert_close(torch.normal(mean, deviation), mean + deviation)
        torch.testing.assert_close(torch.normal(mean, 1.0), mean + 1.0)
        torch.testing.assert_close(torch.poisson(deviation), deviation)
        assert torch.equal(torch.normal(2.0, 3.0, (2, 2)), torch.ones(2, 2))
        assert torch.equal(mean.clone().normal_(), torch.ones(3, 4))

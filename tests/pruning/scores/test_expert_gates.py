"""Scores of experts, and of their neurons, as gates on what they put out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import taylor_kernels as tk
from tests.pruning.mixtures import NEURONS, WIDTH, Biased, Experts, Model


class Gated(Biased):
    """Experts with factors on their neurons, and on what each of them adds."""

    def gate(self) -> tuple[Tensor, Tensor]:
        neurons, experts = torch.ones(NEURONS).to(self.up), torch.ones(self.num_experts).to(self.up)
        self.gates = neurons.requires_grad_(), experts.requires_grad_()
        return self.gates


def passes(model: nn.Module, batches: list[Tensor]) -> Tensor:
    return torch.stack([model(x).tanh().square().sum() for x in batches]).sum()


@pytest.mark.parametrize("several", [False, True], ids=["one pass", "accumulated"])
def test_gates_of_neurons_and_experts(several):
    model = Model()
    model.mixture.experts = Biased(5)
    model.double()
    batches = [torch.randn(3, 7, 4, dtype=torch.float64) for _ in range(1 + several)]
    twin = copy.deepcopy(model)
    twin.mixture.experts.__class__ = Gated
    gates = twin.mixture.experts.gate()
    slopes = torch.autograd.grad(passes(twin, batches), gates)
    neurons, experts = (s.square().float() for s in slopes)
    names = ["mixture.experts.up", "mixture.experts"]
    imp = tk.Importance(model, "taylor_fo_bn", layers=names, example_inputs=batches[0])
    pruner = tk.Pruner(model, batches[0], params=0.9, every=1, ignore=["enter"])
    for x in batches:
        (8.0 * passes(model, [x])).backward()
    for parameter in model.parameters():
        parameter.grad.mul_(0.125)  # what is done to .grad later does not matter
    imp.update(loss_scale=8.0)
    pruner.step(loss_scale=8.0)
    for found in (imp.compute(), pruner.scores()):
        for name, expected in zip(names, (neurons, experts), strict=True):
            # What has just gone has no score.
            expected = expected.where(~found[name].isnan(), torch.nan)
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=0, equal_nan=True)
    assert set(pruner.skipped) == {"head", "enter", "mixture.experts.down"}


def test_what_has_no_gradient_has_no_score():
    model, inputs = Model().double(), torch.randn(3, 7, 4, dtype=torch.float64)
    pruner = tk.Pruner(model, inputs, params=0.95, every=1, ignore=["enter"])
    with tk.scoring(model):
        passes(model, [inputs]).backward()
        with pytest.raises(RuntimeError, match=r"mixture.experts: .* nothing to score"):
            pruner.step()
    pruner.close()
    imp = tk.Importance(model, layers=["head", "mixture.experts"], example_inputs=inputs)
    with tk.scoring(model):
        passes(model, [inputs]).backward()
        with pytest.warns(UserWarning, match="mixture.experts: .* inside tk.scoring"):
            imp.update()
    found = imp.compute()
    assert found["mixture.experts"].isnan().all()
    assert (found["head"] > 0).all()


@pytest.mark.parametrize("criterion", ["taylor_fo_gate", "taylor_so_diag"])
def test_experts_have_no_gates_by_example(criterion):
    inputs = torch.randn(3, 7, 4)
    pruner = tk.Pruner(Model(), inputs, criterion, params=0.95)
    for name in ("mixture.gate", "mixture.experts", "mixture.experts.up"):
        assert "only the slope over a minibatch" in pruner.skipped[name]
    assert "enter" in pruner.widths


def test_experts_with_a_norm_of_their_own_stay():
    """It would undo a factor on the weight in front of it."""

    class Normed(Experts):
        def __init__(self) -> None:
            super().__init__(5)
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor, chosen: Tensor, values: Tensor) -> Tensor:
            y = torch.zeros_like(x)
            for expert in chosen.unique():
                token, place = torch.where(chosen == expert)
                hidden = functional.linear(x[token], self.up[expert]).tanh()
                part = self.norm(functional.linear(hidden, self.down[expert]))
                y.index_add_(0, token, part * values[token, place, None])
            return y

    model, inputs = Model(), torch.randn(3, 7, 4)
    model.mixture.experts = Normed()
    pruner = tk.Pruner(model, inputs, params=0.95)
    assert "mixture.experts.up" in pruner.widths
    assert {"mixture.experts", "mixture.gate"} <= set(pruner.skipped)

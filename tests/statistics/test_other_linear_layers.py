"""GPT-2's linear layer holds its weight as [inputs, outputs], and is scored like any other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import taylor_kernels as tk


class Conv1D(nn.Module):
    """What transformers names so."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf, self.nx = outputs, inputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 3)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.shape[:-1], self.nf)


Conv1D.__module__ = "transformers.pytorch_utils"


def both() -> tuple[nn.Sequential, nn.Sequential]:
    """The same network with the one class of layer and with the other."""
    torch.manual_seed(0)
    own = nn.Sequential(Conv1D(6, 4), nn.Tanh(), Conv1D(3, 6)).double()
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    for one, other in ((own[0], plain[0]), (own[2], plain[2])):
        other.weight.data, other.bias.data = one.weight.data.t().clone(), one.bias.data.clone()
    return own, plain


@pytest.mark.parametrize(
    "criterion", ["taylor_fo", "taylor_fo_gate", "obd_fisher", "magnitude_l2", "taylor_so_diag"]
)
def test_scores_are_those_of_a_linear_layer(criterion):
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    found = []
    for model in both():
        importance = tk.Importance(model, criterion)
        loss = model(x).square().mean()
        loss.backward()
        closure = (lambda m=model: m(x).square().mean()) if importance.needs_closure else None
        importance.update(closure=closure)
        found.append(importance.compute())
        importance.close()
    assert found[0].keys() == found[1].keys() == {"0", "2"}
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name])


def test_it_is_pruned():
    model, _ = both()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = tk.Pruner(model, x, "taylor_fo", filters=0.5, every=1, per_step=3, optimizer=optimizer)
    assert pruner.original_widths == {"0": 6}
    model(x).square().mean().backward()
    pruner.step()
    optimizer.step()
    masked = copy.deepcopy(model)(x)
    pruner.compact()
    assert (model[0].nf, model[2].nx, tuple(model[0].weight.shape)) == (3, 3, (4, 3))
    torch.testing.assert_close(model(x), masked)

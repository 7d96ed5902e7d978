"""Gates of weights that code uses without calling the layer, or that no layer holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import taylor_kernels as tk
from tests.helpers.attentions import data, loss


class Called(nn.Module):
    """Attention of called layers, with grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(6, 8), nn.Linear(8, 5)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.o = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        n, t, _ = h.shape
        q, k, v = (f(h).view(n, t, -1, 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (one.repeat_interleave(2, 1) for one in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.head(h + self.o(y.transpose(1, 2).reshape(n, t, -1)))


def test_heads_of_called_layers_have_the_gate_of_their_context():
    """Not one factor on queries, keys and values at once."""
    model, (x, target) = Called().double(), data()
    found = {}
    for criterion in ("taylor_fo_bn", "taylor_fo_gate"):
        imp = tk.Importance(model, criterion, example_inputs=x[:2])
        loss(model, x, target).backward()
        imp.update()
        found[criterion] = imp.compute()
        imp.close()
    gates = torch.ones(len(x), 2, dtype=torch.float64, requires_grad=True)
    spread = gates.repeat_interleave(4, 1)[:, None]  # a shared head with the two that query it
    with model.o.register_forward_pre_hook(lambda _, args: (args[0] * spread,)):
        (s,) = torch.autograd.grad(loss(model, x, target), gates)
    for name, rows in (("q", 4), ("k", 2), ("v", 2)):
        for criterion, expected in (
            ("taylor_fo_bn", s.sum(0).square()),
            ("taylor_fo_gate", s.square().mean(0)),
        ):
            torch.testing.assert_close(
                found[criterion][name], expected.float().repeat_interleave(rows), rtol=1e-5, atol=0
            )


class Borrowing(nn.Module):
    """Code that multiplies by the weights of layers and never calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.linear(x, self.up.weight, self.up.bias).relu()
        return self.head(functional.linear(h, self.down.weight, self.down.bias).relu())


def test_layers_that_other_code_uses_are_pruned_by_default():
    model, (x, target) = Borrowing().double(), data()
    h = functional.linear(x, model.up.weight, model.up.bias).relu()
    gates = torch.ones(len(x), 1, 8, dtype=torch.float64, requires_grad=True)
    y = functional.linear(h * gates, model.down.weight, model.down.bias).relu()
    (s,) = torch.autograd.grad((model.head(y) - target).square().sum(), gates)
    pruner = tk.Pruner(model, x[:1], params=0.7, every=1)
    assert set(pruner.skipped) == {"head"}
    loss(model, x, target).backward()
    pruner.step()
    torch.testing.assert_close(
        pruner.scores()["up"].nan_to_num(), s.sum((0, 1)).square().float(), rtol=1e-4, atol=10.0
    )


class Matrices(nn.Module):
    """Parameters of its own, of [inputs, outputs]."""

    def __init__(self, computed: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 7))
        self.head, self.computed = nn.Linear(7, 5), computed

    def forward(self, x: Tensor) -> Tensor:
        down = self.down.tanh() if self.computed else self.down
        return self.head(((x @ self.up).relu() @ down).relu())


def test_weights_of_no_layer_have_gates_over_a_minibatch():
    model, (x, target) = Matrices(False).double(), data()
    gates = torch.ones(8, dtype=torch.float64, requires_grad=True)
    y = (((x @ model.up).relu() * gates) @ model.down).relu()
    (s,) = torch.autograd.grad((model.head(y) - target).square().sum(), gates)
    imp = tk.Importance(model, layers=["up"], example_inputs=x[:1])
    pruner = tk.Pruner(model, x[:1], params=0.7)
    assert set(pruner.skipped) == {"head"}
    loss(model, x, target).backward()
    imp.update()
    torch.testing.assert_close(imp.compute()["up"], s.square().float(), rtol=1e-5, atol=0)


def test_what_is_computed_of_a_weight_is_not_linear_in_it():
    pruner = tk.Pruner(Matrices(True), torch.randn(1, 5, 6), params=0.9)
    assert "it is a weight that no layer holds" in pruner.skipped["up"]
    assert "down" in pruner.widths

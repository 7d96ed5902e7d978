"""Layers whose weight other code multiplies by are left out with a warning; the rest is scored."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import taylor_kernels as tk

# Criteria that look at outputs; those of second order run the model themselves.
PLAIN = ("taylor_fo_gate", "taylor_fo_bn", "obd_fisher")
CLOSURES = ("taylor_so_diag", "obd_fisher_mc")


class Borrower(nn.Module):
    """A function multiplies by the weight of one layer; two others are called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lent, self.last = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(functional.linear(self.first(x).tanh(), self.lent.weight).tanh())


MODELS = {
    "a function": (Borrower, "lent", (7, 6)),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        "self_attn.out_proj",
        (2, 5, 8),
    ),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("criterion", [*PLAIN, *CLOSURES])
def test_other_layers_have_the_scores_that_they_have_alone(kind, criterion) -> None:
    make, uncalled, shape = MODELS[kind]
    model, x = make(), torch.randn(shape)
    called = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != uncalled]
    meters = [tk.Importance(model, criterion), tk.Importance(model, criterion, layers=called)]

    def loss():
        return model(x).square().mean()

    loss().backward()
    closure = {"closure": loss} if criterion in CLOSURES else {}
    with pytest.warns(UserWarning, match=rf"{uncalled}: never called, .* have no score"):
        meters[0].update(**closure)
    meters[1].update(**closure)
    every, alone = (imp.compute() for imp in meters)
    assert every.pop(uncalled).isnan().all()
    torch.testing.assert_close(every, alone, rtol=0, atol=0)


def test_it_is_an_error_where_nothing_else_is_scored() -> None:
    model = Borrower()
    imp = tk.Importance(model, "taylor_fo_gate", layers=["lent"])
    model(torch.randn(7, 6)).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"lent: never called, .* nothing to score"):
        imp.update()


def test_it_is_said_once() -> None:
    model, x = Borrower(), torch.randn(7, 6)
    imp = tk.Importance(model, "obd_fisher")
    model(x).square().mean().backward()
    with pytest.warns(UserWarning, match="lent"):
        imp.update()
    model(x).square().mean().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        imp.update()
    assert imp.compute()["lent"].isnan().all()

"""Routers of mixtures some of whose experts are masked: no token goes to those."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import taylor_kernels as tk
from taylor_kernels.tracing import trace
from tests.pruning.mixtures import Mixture, Model, Router


def test_a_masked_expert_is_chosen_by_no_token():
    torch.manual_seed(1)
    model = Model(experts=4).double()
    inputs = torch.randn(5, 6, 4, dtype=torch.float64)
    with torch.no_grad():  # the one that goes first
        for stack in (model.mixture.gate.weight, *model.mixture.experts.parameters()):
            stack[2] *= 1e-4
    assert (model.mixture.gate(model.norm(model.enter(inputs)).flatten(0, 1))[2] == 2).any()
    # The width stays, and with it the norm, so that only the router is run on what is kept.
    pruner = tk.Pruner(
        model, inputs, "magnitude_l2", params=0.6, every=1, per_step=0.1, ignore=["enter"]
    )
    seen: list[tuple[Tensor, Tensor]] = []
    while pruner.widths["mixture.gate"] == 4 and not pruner.done:
        pruner.step()
    model.mixture.gate.register_forward_hook(lambda _, __, out: seen.append((out[0], out[2])))
    dead = ~model.mixture.gate.weight.any(1)
    assert dead[2]
    assert int(dead.sum()) == 4 - pruner.widths["mixture.gate"]
    model(inputs)
    logits, chosen = seen[0]
    assert not torch.isin(chosen, dead.nonzero()).any()
    assert torch.equal(logits.isneginf(), dead.expand_as(logits))
    pruner.close()
    with pytest.raises(ValueError, match=r"its router 'mixture.gate' is run on the"):
        tk.Pruner(model, inputs, "taylor_fo", filters=0.5)


class Routing(NamedTuple):
    by_expert: Any
    values: Tensor
    chosen: Tensor


class OwnRouter(Router):
    def __init__(self, kind: str, experts: int, top_k: int) -> None:
        super().__init__(experts, top_k, normalised=True)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        logits, values, chosen = super().forward(x)
        by_expert = {
            "logits": lambda: logits,
            "alone": lambda: chosen,
            "probabilities": lambda: logits.softmax(-1),
            "sigmoids": lambda: logits.sigmoid(),
            "counts": lambda: torch.bincount(chosen.flatten(), minlength=self.num_experts),
            "one-hot": lambda: functional.one_hot(chosen, self.num_experts),
            "bool": lambda: functional.one_hot(chosen, self.num_experts).bool(),
        }[self.kind]()
        return by_expert if self.kind == "alone" else Routing(by_expert, values, chosen)


class Balanced(Mixture):
    """A mixture that keeps a loss of load balancing while it trains."""

    def __init__(self, kind: str, experts: int = 6, top_k: int = 2) -> None:
        super().__init__(experts, top_k, True)
        self.gate, self.loss = OwnRouter(kind, experts, top_k), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        flat, kind = x.flatten(0, -2), self.gate.kind
        routing = self.gate(flat)
        if kind == "alone":
            routing = Routing(None, torch.ones(routing.shape).to(x), routing)
        if self.training and kind in ("logits", "probabilities"):
            held = routing.by_expert
            shares = held if kind == "probabilities" else held.softmax(-1)
            load = functional.one_hot(routing.chosen, held.size(-1)).to(x).mean((0, 1))
            self.loss = (load * shares.mean(0)).sum()
        return self.experts(flat, routing.chosen, routing.values).view_as(x)


def balanced(kind: str) -> tuple[Model, Tensor, tk.Pruner]:
    torch.manual_seed(0)
    model = Model()
    model.mixture = Balanced(kind)
    inputs = torch.randn(6, 7, 4, dtype=torch.float64)
    model.double()
    params = 0.1 + 0.9 * 2 / 6
    return (
        model,
        inputs,
        tk.Pruner(model, inputs, "magnitude_l2", params=params, every=1, ignore=["enter"]),
    )


@pytest.mark.parametrize("kind", ["logits", "alone", "probabilities"])
def test_a_loss_of_load_balancing_is_what_it_is_after_removal(kind):
    model, inputs, pruner = balanced(kind)
    while not pruner.done:
        pruner.step()
    assert pruner.widths["mixture.gate"] < 6
    model.train()
    output, loss = model(inputs), model.mixture.loss
    with pytest.warns(UserWarning, match="new parameters"):
        pruner.compact()
    assert model.mixture.gate.num_experts < 6
    torch.testing.assert_close(model(inputs), output, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.mixture.loss, loss, rtol=0, atol=1e-10)
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("sigmoids", "no negative number for any expert"),
        ("counts", r"integers of shape \(6,\), which are no numbers of 2 experts"),
        ("one-hot", r"integers of shape \(42, 2, 6\), which are no numbers of 2 experts"),
        ("bool", "bool values"),
    ],
)
def test_a_router_that_returns_something_else_by_expert_keeps_them(kind, reason):
    pruner = balanced(kind)[2]
    assert "mixture.gate" not in pruner.widths
    assert re.search(reason, pruner.skipped["mixture.gate"])


def test_a_router_of_another_form_than_on_the_example_says_so():
    model, inputs, pruner = balanced("logits")
    while not pruner.done:
        pruner.step()
    model.mixture.gate.kind = "alone"
    with pytest.raises(
        RuntimeError, match=r"returns something of another form .* compact\(\) first"
    ):
        model(inputs)


def test_logits_that_are_returned_keep_the_experts():
    class Returning(Model):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), self.mixture.gate(self.norm(self.enter(x)).flatten(0, 1))[0]

    channels = trace(Returning().double(), torch.randn(2, 3, 4, dtype=torch.float64))
    assert channels.skipped["mixture.gate"] == "reaches the output of the model"

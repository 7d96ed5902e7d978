"""A model whose pruner has masked something and is open."""

from __future__ import annotations

from taylor_kernels.pruning import Pruner
from tests.helpers import zoo


def minibatch(model, inputs, pruner):
    model.zero_grad()
    zoo.loss(model, zoo.fresh(inputs)).backward()
    return pruner.step()


def masked(name="mlp", criterion="taylor_fo_bn", **options):
    """A model with masked filters, and its pruner, which is open."""
    model, inputs = zoo.build(name)
    options = {"filters": 0.5, "every": 1, "per_step": 3} | options
    pruner = Pruner(model, inputs, criterion, **options)
    for _ in range(2):
        minibatch(model, inputs, pruner)
    assert not pruner.done
    return model, inputs, pruner

"""A run that is saved and resumed, and all that there is of it."""

from __future__ import annotations

import copy

import torch

from taylor_kernels.pruning import Pruner
from tests.helpers import zoo


def same(one, other):
    """Equal bits, all the way down."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def everything(model, optimizer, pruner):
    return {
        "model": copy.deepcopy(model.state_dict()),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "pruner": copy.deepcopy(pruner.state_dict()),
    }


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)


def trained(name="resnet", steps=11, importance="taylor_fo_bn", **options):
    torch.manual_seed(1)
    model, inputs = zoo.build(name)
    optimizer = sgd(model)
    settings = {"params": 0.4, "every": 3, "per_step": 0.1, "optimizer": optimizer} | options
    pruner = Pruner(model, inputs, importance, **settings)
    go_on(model, optimizer, pruner, inputs, steps)
    return model, optimizer, pruner, inputs


def go_on(model, optimizer, pruner, inputs, steps):
    for step in range(steps):
        optimizer.zero_grad()
        zoo.loss(model, zoo.fresh(inputs)).backward()
        pruner.step()
        optimizer.step()
        if step == 6:
            pruner.compact()

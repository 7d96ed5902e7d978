"""The short ways through a model's modules give what PyTorch's own give."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

import taylor_kernels as tk
from taylor_kernels import shards
from taylor_kernels.pruning.masks.named_tensors import NamedTensors


def random_net(draw: random.Random, depth: int, shared: list[nn.Module]) -> nn.Module:
    """A tree with modules and parameters in several places, and with places that are empty."""
    module = nn.Module()
    for number in range(draw.randint(0, 3)):
        module.register_parameter(f"p{number}", draw.choice([None, nn.Parameter(torch.ones(1))]))
        persistent = draw.choice([True, False])
        module.register_buffer(f"b{number}", draw.choice([None, torch.ones(2)]), persistent)
        if shared and draw.random() < 0.5:
            module.add_module(f"s{number}", draw.choice(shared))
    for number in range(draw.randint(0, 3) if depth else 0):
        child = random_net(draw, depth - 1, shared)
        module.add_module(f"m{number}", draw.choice([None, child]))
        shared.append(child)
        tied = [p for p in child._parameters.values() if p is not None]
        if tied:
            module.register_parameter(f"t{number}", draw.choice(tied))
    return module


def all_names(model: nn.Module) -> dict[str, torch.Tensor]:
    names = dict(model.named_parameters(remove_duplicate=False))
    return names | dict(model.named_buffers(remove_duplicate=False))


@pytest.mark.parametrize("seed", range(20))
def test_all_modules_and_any_names(seed):
    draw = random.Random(seed)
    model = random_net(draw, 4, [])
    assert shards.walk(model) == set(model.modules())
    names = all_names(model)
    wanted = draw.sample(sorted(names), len(names) // 2)
    way = NamedTensors(["", "p0.no", *wanted, "m9.m0.p0"])
    for _ in range(2):
        none, within, *found, last = way.of(model)
        assert none is within is last is None
        assert all(t is names[name] for name, t in zip(wanted, found, strict=True))
        # Others are put in their places, and in those of the modules that hold them.
        for module in list(model.modules()):
            for held in (module._parameters, module._buffers):
                held.update({name: t + 1 for name, t in held.items() if t is not None})
            module._modules.update({n: copy.copy(child) for n, child in module._modules.items()})
        names = all_names(model)


def test_a_pass_asks_once_whether_the_model_is_sharded(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "taylor_kernels.statistics.minibatch_gates.is_fsdp", lambda model: bool(asked.append(model))
    )
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(5)]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(16, 2))
    imp = tk.Importance(model, "taylor_fo_bn")
    for passes in range(1, 4):
        model(torch.randn(3, 4, 2, 2)).square().sum().backward()
        imp.update()
        assert len(asked) == passes

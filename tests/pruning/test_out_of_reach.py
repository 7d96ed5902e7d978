"""A target that cannot be reached: what to do about it, and which layers stay whole and why."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from torch import nn

import taylor_kernels as tk


def stack(*widths):
    layers = [[nn.Linear(*pair), nn.Tanh()] for pair in pairwise(widths)]
    return nn.Sequential(*(module for pair in layers for module in pair), nn.Linear(widths[-1], 3))


def message(model, **options):
    with pytest.raises(ValueError, match=r"^params: .* cannot be reached; .*; raise the t") as got:
        tk.Pruner(model, torch.randn(4, 5), **{"params": 1e-4, **options})
    return str(got.value)


@pytest.mark.parametrize("round_to", [1, 2])
@pytest.mark.parametrize("min_filters", [1, 3])
@pytest.mark.parametrize("ignore", [(), ("2",)], ids=["", "ignore"])
def test_only_ways_that_lead_somewhere_are_named(round_to, min_filters, ignore):
    bounds = dict(round_to=round_to, min_filters=min_filters, ignore=ignore)
    said = message(stack(5, 8, 8, 8), **bounds)
    assert ("lower round_to" in said) == (round_to > 1)
    assert ("lower min_filters" in said) == (min_filters > 1)
    assert ("ignore fewer layers" in said) == bool(ignore)
    # Each of them is a way to a smaller model.
    least = float(re.search(r"minimum (\S+) of", said)[1])
    for way, looser in (("round_to", 1), ("min_filters", 1), ("ignore", ())):
        if way.split("_")[0] in said.split("raise the target")[1].split(";")[0]:
            other = message(stack(5, 8, 8, 8), **bounds | {way: looser})
            assert float(re.search(r"minimum (\S+) of", other)[1]) < least


def test_frozen_layers_are_named_with_the_reason():
    model = stack(5, 8, 8, 8)
    model[:4].requires_grad_(False)
    said = message(model, criterion="taylor_fo")
    assert "all filters stay of 0, 2 (its weights are frozen" in said
    assert "6 (reaches the output of the model)" in said


def test_many_layers_are_counted_and_the_commonest_reason_comes_first():
    frozen = stack(5, *[8] * 9)
    frozen[:14].requires_grad_(False)
    shown = message(frozen, criterion="taylor_fo").split("all filters stay of ")[1]
    assert shown.startswith("0, 2, 4, 6 and 3 more (its weights are frozen")

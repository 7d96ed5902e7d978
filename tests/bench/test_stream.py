"""What bench_stream counts: the activations that autograd keeps, each once, and no parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import taylor_kernels as tk

pytest.importorskip("pytest_benchmark", reason="the benches need pytest-benchmark")

from bench.bench_stream import counted


def test_each_activation_counts_once_and_weights_do_not():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x = torch.randn(4, 5)
    with counted(model) as kept:
        model(x)
    hidden = 4 * 7 * 4  # what tanh returns is what the second layer is given
    assert sum(kept.values()) == x.nbytes + hidden
    with tk.scoring(model), counted(model) as kept:
        model(x)
    assert sum(kept.values()) == hidden  # of tanh alone: no layer needs its input

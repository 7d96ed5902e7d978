"""Traces in several threads leave PyTorch, and the model, as they were."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from taylor_kernels.tracing import trace


class Attended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x, x, x)[0])


def test_tensors_and_modules_are_as_they_were():
    methods = {name: vars(torch.Tensor).get(name) for name in ("numpy", "tolist", "__array__")}
    shared, x = Attended().eval(), torch.randn(2, 5, 8)
    models = [shared, shared, Attended().eval()]
    expected = [trace(model, x).skipped for model in models]
    start, found, errors = threading.Barrier(len(models)), {}, []

    def run(number: int) -> None:
        try:
            start.wait(60)
            for _ in range(4):
                found[number] = trace(models[number], x).skipped
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    assert [found[n] for n in range(len(models))] == expected
    assert {name: vars(torch.Tensor).get(name) for name in methods} == methods
    assert all(type(model.attention) is nn.MultiheadAttention for model in models)

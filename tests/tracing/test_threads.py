"""Traces in several threads leave PyTorch, and the model, as they were."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.tracing import trace
from taylor_kernels.tracing.running import quiet


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


class Waiting(nn.Module):
    """Says that it runs, and runs on once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.runs.set()
        assert self.may.wait(60)
        return self.head(self.first(x))


def waiting() -> Waiting:
    model = Waiting()
    model.runs, model.may = threading.Event(), threading.Event()
    return model


def test_a_trace_begins_when_the_other_has_ended():
    one, other, x = waiting(), waiting(), torch.randn(2, 8)
    other.may.set()
    sizes: dict[str, list[int]] = {}

    def run(name: str, model: nn.Module) -> None:
        sizes[name] = [group.size for group in trace(model, x).groups]

    threads = [
        threading.Thread(target=run, args=pair, daemon=True)
        for pair in (("one", one), ("other", other))
    ]
    threads[0].start()
    assert one.runs.wait(60)
    threads[1].start()
    assert not other.runs.wait(0.3)
    one.may.set()
    for thread in threads:
        thread.join(60)
    assert sizes == {"one": [6], "other": [6]}


def test_a_trace_can_be_made_within_another():
    class Traces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(8, 6), nn.Linear(6, 3)
            self.others = [nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 2))]

        def forward(self, x: Tensor) -> Tensor:
            assert [g.size for g in trace(self.others[0], torch.randn(1, 8)).groups] == [5]
            return self.head(self.first(x))

    assert [group.size for group in trace(Traces(), torch.randn(1, 8)).groups] == [6]


def test_settings_of_pytorch_are_as_they_were():
    """A second thread comes in while the first one is inside, and leaves after it."""
    inside, leave, came = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with quiet():
            inside.set()
            assert leave.wait(60)

    def second() -> None:
        with quiet():
            came.set()
            threads[0].join(0.3)

    threads = [threading.Thread(target=run, daemon=True) for run in (first, second)]
    fast = torch.backends.mha.get_fastpath_enabled()
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    assert not came.wait(0.3)
    leave.set()
    for thread in threads:
        thread.join(60)
    assert came.is_set()
    assert torch.backends.mha.get_fastpath_enabled() is fast


def test_pruners_can_be_made_in_several_threads():
    x, dtype = torch.randn(1, 16), torch.get_default_dtype()
    fast = torch.backends.mha.get_fastpath_enabled()
    models = [nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(6)]
    start, found, errors = threading.Barrier(3), [], []

    def run(number: int) -> None:
        try:
            start.wait(60)
            for model in models[number::3]:
                found.append(tk.Pruner(model, x, "magnitude_l2", filters=0.5).widths)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    assert found == [{"0": 16}] * 6
    assert torch.get_default_dtype() is dtype
    assert torch.backends.mha.get_fastpath_enabled() is fast

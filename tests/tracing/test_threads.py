"""Traces in several threads leave PyTorch, and the model, as they were."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.tracing import trace
from taylor_kernels.tracing.run import running
from taylor_kernels.tracing.run.running import quiet


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
        with quiet([nn.Linear(1, 1)]):
            inside.set()
            assert leave.wait(60)

    def second() -> None:
        with quiet([nn.Linear(1, 1)]):
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


class RunsAnother(nn.Module):
    """Runs something in another thread whenever it runs itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        thread = threading.Thread(target=self.other, daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
        return self.head(self.second(hidden))


def test_a_model_of_another_thread_is_no_part_of_a_trace():
    """It begins while a module of the traced one runs, and ends within the next one."""

    class Multiplied(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(inputs, outputs))

        def forward(self, x: Tensor) -> Tensor:
            self.meanwhile()
            return x @ self.matrix

    def begin() -> None:
        threads.append(threading.Thread(target=other, args=(x,), daemon=True))
        threads[0].start()
        assert other.runs.wait(60)

    def end() -> None:
        other.may.set()
        threads[0].join(60)
        assert not threads[0].is_alive()

    model = nn.Sequential(Multiplied(8, 6), Multiplied(6, 5), nn.Linear(5, 3))
    other, x, threads = waiting(), torch.randn(2, 8), []
    model[0].meanwhile = model[1].meanwhile = lambda: None
    expected = trace(model, x)
    model[0].meanwhile, model[1].meanwhile = begin, end
    found = trace(model, x)
    assert threads
    assert str(found) == str(expected)
    assert found.outside == expected.outside
    assert [step.module for step in found.steps] == [step.module for step in expected.steps]


def test_what_another_thread_makes_during_a_proof_is_as_ever():
    model, x = RunsAnother(), torch.randn(2, 8)
    fast, found = torch.backends.mha.get_fastpath_enabled(), []

    def make() -> None:
        layer = nn.Linear(3, 2)
        found.append((layer.weight.dtype, torch.zeros(2).dtype, torch.tensor(0.5).dtype))
        assert torch.backends.mha.get_fastpath_enabled() is fast

    model.other = make
    tk.Pruner(model, x, "magnitude_l2", filters=0.5)
    assert len(found) > 2  # the trace, and the runs of the proof
    assert set(itertools.chain(*found)) == {torch.float32}


def test_models_are_made_while_others_are_proven():
    dtype, fast = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    stop, proven, errors, made = threading.Event(), [], [], set()

    def prove() -> None:
        try:
            for _ in range(6):
                model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
                proven.append(tk.Pruner(model, torch.randn(1, 3, 8), "magnitude_l2", filters=0.5))
        except Exception as error:
            errors.append(error)
        finally:
            stop.set()

    thread = threading.Thread(target=prove, daemon=True)
    thread.start()
    while not stop.is_set():
        model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        made |= {parameter.dtype for parameter in model.parameters()}
        made.add(model(torch.zeros(1, 3, 8)).dtype)
    thread.join(120)
    assert not errors
    assert len(proven) == 6
    assert made == {torch.float32}
    assert torch.get_default_dtype() is dtype
    assert torch.backends.mha.get_fastpath_enabled() is fast


def test_a_thread_does_not_wait_for_ever(monkeypatch):
    model, x = waiting(), torch.randn(2, 8)
    thread = threading.Thread(target=trace, args=(model, x), daemon=True)
    thread.start()
    assert model.runs.wait(60)
    monkeypatch.setattr(running, "WAIT", 0.2)
    small = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    message = "other threads have traced or tried theirs for 0.2 seconds"
    with pytest.raises(TimeoutError, match=message):
        trace(small, x)
    with pytest.raises(TimeoutError, match=message):
        tk.Pruner(small, x, "magnitude_l2", filters=0.5)
    model.may.set()
    thread.join(60)
    assert not thread.is_alive()
    assert [group.size for group in trace(small, x).groups] == [6]

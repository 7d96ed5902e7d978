"""Ctrl-C while a model is cut."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Iterator

import pytest
import torch

from taylor_kernels.pruning import Pruner, network
from taylor_kernels.pruning.uninterrupted import uninterrupted
from tests.helpers import zoo

pytestmark = pytest.mark.usefixtures("one_thread", "python_handles")


@pytest.fixture
def python_handles() -> Iterator[None]:
    """Python's handler; a job in the background of a shell has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_model_is_cut_as_a_whole_before_an_interrupt_comes(monkeypatch):
    """Tensors, optimizer and pruner; the interrupt itself is not lost, nor its handler."""
    model, inputs = zoo.build("resnet", torch.float64)
    optimizer = torch.optim.Adam(model.parameters())
    pruner = Pruner(model, inputs, filters=0.7, every=1, per_step=0.2, optimizer=optimizer)

    def step():
        optimizer.zero_grad()
        zoo.loss(model, inputs).backward()
        pruner.step()
        optimizer.step()

    step()
    masked = copy.deepcopy(model).eval()
    remove, handler = network.remove, signal.getsignal(signal.SIGINT)

    def interrupted(*given):
        interrupt()
        remove(*given)

    monkeypatch.setattr(network, "remove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruner.compact()
    assert signal.getsignal(signal.SIGINT) is handler
    widths = {name: len(model.get_submodule(name).weight) for name in pruner.widths}
    assert widths == pruner.widths != pruner.original_widths
    torch.testing.assert_close(zoo.forward(model.eval(), inputs), zoo.forward(masked, inputs))
    model.train()
    monkeypatch.undo()
    while not pruner.done:
        step()


@pytest.mark.parametrize("interrupts", [0, 1, 3])
def test_a_handler_that_is_set_inside_stays_and_reaches_the_one_before(interrupts):
    """The one before is told once of what came before the end, and of each that comes after it."""
    told, own = [], []
    signal.signal(signal.SIGINT, lambda *given: told.append(given))
    with uninterrupted():
        for _ in range(interrupts):
            interrupt()
        inner = signal.getsignal(signal.SIGINT)

        def chained(number, frame):
            own.append(number)
            inner(number, frame)

        signal.signal(signal.SIGINT, chained)
        assert not told
    assert signal.getsignal(signal.SIGINT) is chained
    assert (len(told), len(own)) == (min(interrupts, 1), 0)
    interrupt()
    signal.signal(signal.SIGINT, inner)
    interrupt()
    assert (len(told), len(own)) == (min(interrupts, 1) + 2, 1)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL, None])
def test_what_python_does_not_handle_is_left_as_it_is(handler, monkeypatch):
    """`getsignal` returns None where C code has set a handler, which nothing in Python restores."""
    if handler is None:
        monkeypatch.setattr(signal, "getsignal", lambda number: None)
    else:
        signal.signal(signal.SIGINT, handler)
    with monkeypatch.context() as inside:
        inside.setattr(signal, "signal", lambda *given: pytest.fail(f"sets {given}"))
        with uninterrupted():
            if handler is signal.SIG_IGN:
                interrupt()
    assert signal.getsignal(signal.SIGINT) is handler

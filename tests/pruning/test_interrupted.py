"""Ctrl-C while a model is cut."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch

from taylor_kernels.pruning import Pruner, network
from tests.helpers import zoo

pytestmark = pytest.mark.usefixtures("one_thread")


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
        os.kill(os.getpid(), signal.SIGINT)
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

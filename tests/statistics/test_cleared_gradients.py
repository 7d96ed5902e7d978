"""Passes whose gradients a loop has cleared: they count, which is said, and skip() forgets them."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from torch import nn

import taylor_kernels as tk
from taylor_kernels.criteria import get_criterion
from taylor_kernels.statistics import get_statistic
from tests.helpers import nets

pytestmark = pytest.mark.usefixtures("one_thread")
GATHERING = [
    name
    for name in tk.criterion_names()
    if get_statistic(get_criterion(name).statistic).reads == "activations"
]


def backward(model, *, clear, seed):
    """A pass on data of its own; gradients are cleared before it, behind forward(), or not."""
    torch.manual_seed(seed)
    if clear == "early":
        model.zero_grad()
    loss = nets.loss_of(model, nets.batch(random.Random(seed).randrange(2, 7)))
    if clear == "late":
        model.zero_grad()
    loss.backward()


def second(model, seed):
    """As of SAM, or of a discriminator that trains a generator."""
    backward(model, clear=None, seed=seed)


def failed(model, seed):
    """A backward pass that stops where most layers have had their gradients."""

    def stop(grad):
        raise FloatingPointError("stop")

    handle = model.stem.register_forward_hook(lambda *a: a[2].register_hook(stop) and None)
    with pytest.raises(FloatingPointError):
        backward(model, clear=None, seed=seed)
    handle.remove()


def penalty(model, seed):
    """The gradient of an input, which leaves none in parameters."""
    torch.manual_seed(seed)
    x = nets.batch()[0].requires_grad_()
    torch.autograd.grad(model(x).square().sum(), x)


def scores(model, criterion, clear, intruder=None, *, skip=False):
    """Of a few updates of one to three accumulated passes; the intruder runs behind each."""
    imp = tk.Importance(model, criterion)
    for update in range(3):
        for k in range(random.Random(update).randint(1, 3)):
            backward(model, clear=None if k else clear, seed=10 * update + k)
        imp.update()
        if intruder is not None:
            intruder(model, 100 + update)
            if skip:
                imp.skip()
    imp.close()
    return imp.compute()


@pytest.mark.parametrize("criterion", GATHERING)
@pytest.mark.parametrize("clear", ["early", "late"])
@pytest.mark.parametrize("intruder", [second, failed, penalty])
def test_cleared_passes_are_said_to_count_and_skip_forgets_them(criterion, clear, intruder):
    torch.manual_seed(random.Random().randrange(2**31))
    model = nets.mixed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = scores(copy.deepcopy(model), criterion, clear)
        found = scores(copy.deepcopy(model), criterion, clear, intruder, skip=True)
    assert all(found[name].equal(value) for name, value in expected.items())
    with pytest.warns(UserWarning, match=r"gradients were cleared between.*skip\(\)") as told:
        other = scores(copy.deepcopy(model), criterion, clear, intruder)
    assert [one.filename for one in told] == [__file__]
    assert not all(other[name].equal(value) for name, value in expected.items())


@pytest.mark.parametrize("criterion", GATHERING)
def test_nothing_is_said_where_no_gradient_is_made_or_none_is_cleared(criterion):
    model = nets.mixed()
    backward(model, clear=None, seed=0)  # gradients that were there before
    imp = tk.Importance(model, criterion)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tk.scoring(model):
            for seed in range(2):
                backward(model, clear="early", seed=seed)
            imp.update()
        for seed in range(2):
            backward(model, clear=None, seed=seed)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        imp.update()
        for seed in range(2):  # in the wrong order, but nothing is lost
            backward(model, clear="late", seed=seed)
            model.zero_grad()
            imp.update()

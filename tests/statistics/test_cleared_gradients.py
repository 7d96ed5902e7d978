"""Passes whose gradients a loop has cleared: they count, which is said, and skip() forgets them."""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections.abc import Callable

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


Loop = Callable[[nn.Module, Callable[[], object], bool], None]


def plain(model: nn.Module, update: Callable[[], object], none: bool) -> None:
    """One pass for each step, of two optimizers that have a part of the model each."""
    parts = list(model.parameters())
    optimizers = [torch.optim.SGD(parts[:3], 0.01), torch.optim.Adam(parts[3:])]
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=none)
    backward(model, clear=None, seed=0)
    nn.utils.clip_grad_norm_(parts, 0.1)
    update()
    for optimizer in optimizers:
        optimizer.step()


def accumulated(model: nn.Module, update: Callable[[], object], none: bool) -> None:
    """Clipped; gradients of an input are made in between, and the stem is frozen by now."""
    model.stem.requires_grad_(False)
    model.zero_grad(set_to_none=none)
    for seed in range(3):
        backward(model, clear=None, seed=seed)
        nn.utils.clip_grad_value_(model.parameters(), 0.1)
    update()


def with_graphs(model: nn.Module, update: Callable[[], object], none: bool) -> None:
    """Out of place: each pass with a graph leaves another tensor."""
    for graphs in [(True, True), (False, True, True), (True, False, True)]:
        model.zero_grad(set_to_none=none)
        for seed, graph in enumerate(graphs):
            torch.manual_seed(seed)
            nets.loss_of(model, nets.batch()).backward(create_graph=graph)
        update()


def as_returned(model: nn.Module, update: Callable[[], object], none: bool) -> None:
    """Gradients that nobody puts into `.grad`."""
    for seed in range(3):
        torch.manual_seed(seed)
        torch.autograd.grad(nets.loss_of(model, nets.batch()), list(model.parameters()))
    update()


def own_buffers(model: nn.Module, update: Callable[[], object], none: bool) -> None:
    """Gradients are moved into buffers after each pass."""
    sums = [torch.zeros_like(p) for p in model.parameters()]
    for seed in range(3):
        backward(model, clear=None, seed=seed)
        for total, parameter in zip(sums, model.parameters(), strict=True):
            total += 0 if parameter.grad is None else parameter.grad
            parameter.grad = None
    update()


def closures(model: nn.Module, update: Callable[[], object], none: bool) -> None:
    """LBFGS runs its closure several times, and each time is an update."""
    optimizer = torch.optim.LBFGS(model.parameters(), 1e-3, max_iter=3)

    def closure():
        optimizer.zero_grad(set_to_none=none)
        loss = nets.loss_of(model, nets.batch())
        loss.backward()
        update()
        return loss

    optimizer.step(closure)


def updating(model: nn.Module, pruned: bool) -> Callable[[], object]:
    """What takes in the passes of an update: of a pruner, or of a meter."""
    if not pruned:
        return tk.Importance(model, "taylor_fo_gate").update
    example = nets.batch()[0]
    return tk.Pruner(model, example, "taylor_fo_gate", filters=0.5, every=2, per_step=1).step


@pytest.mark.filterwarnings("ignore:Using backward")  # that graphs may stay alive
@pytest.mark.parametrize("none", [False, True])
@pytest.mark.parametrize(
    "loop", [plain, accumulated, with_graphs, as_returned, own_buffers, closures]
)
@pytest.mark.parametrize("pruned", [False, True])
def test_nothing_is_said_in_ordinary_loops(loop: Loop, pruned: bool, none: bool) -> None:
    model = nets.mixed()
    update = updating(model, pruned)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "several backward passes")
        for _ in range(4):
            loop(model, update, none)


@pytest.mark.parametrize("pruned", [False, True])
def test_where_all_passes_count_the_warning_says_so_and_how_to_filter_it(pruned):
    """Gradients that are moved into buffers after each pass, and back before the update."""
    model = nets.mixed()
    gather = updating(model, pruned)

    def update():
        backward(model, clear=None, seed=3)
        gather()

    with pytest.warns(UserWarning, match=r"skip\(\).*If all of them are to count") as told:
        own_buffers(model, update, none=True)
    how = re.search(r"warnings.filterwarnings\('(.*)', '(.*)'\)", str(told[0].message))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(*how.groups())
        warnings.warn(told[0].message, stacklevel=1)

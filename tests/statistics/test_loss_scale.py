"""A loss that was scaled gives the scores of one that was not, at no cost of its own."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import taylor_kernels as tk
from taylor_kernels.criteria import get_criterion
from taylor_kernels.statistics import find_layers, get_statistic
from tests.helpers import nets

pytestmark = pytest.mark.usefixtures("one_thread")
CRITERIA = [
    name
    for name in tk.criterion_names()
    if get_statistic(get_criterion(name).statistic).reads in ("weight gradients", "activations")
]


class Copies(TorchDispatchMode):
    """Counts the operations that make a tensor of numbers of the host, or bring one elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in ("aten::lift_fresh", "aten::_to_copy", "aten::copy_")
        return func(*args, **(kwargs or {}))


def scores(criterion, scale):
    torch.manual_seed(0)
    model = nets.mixed()
    imp = tk.Importance(model, criterion)
    for _ in range(2):
        model.zero_grad()
        (nets.loss_of(model, nets.batch()) * scale).backward()
        imp.update(loss_scale=scale)
    return imp.compute()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("exponent", [16, 9, -3])
def test_a_power_of_two_changes_no_bit(criterion, exponent):
    expected = scores(criterion, 1.0)
    found = scores(criterion, 2.0**exponent)
    assert all(found[name].equal(value) for name, value in expected.items())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_other_scales_are_divided_out(criterion):
    found = scores(criterion, 937.5)
    for name, value in scores(criterion, 1.0).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4 * float(value.max()))


@pytest.mark.parametrize("name", ["moments", "gates"])
def test_it_copies_nothing_to_the_device(name):
    torch.manual_seed(0)
    model = nets.mixed()
    statistic = get_statistic(name)(model, find_layers(model, None, trainable_only=False))
    copies = []
    for scale in (1.0, 4.0, 1.0, 8.0):
        model.zero_grad()
        (nets.loss_of(model, nets.batch()) * scale).backward()
        with Copies() as counted:
            statistic.collect(loss_scale=scale)
        copies.append(counted.count)
    assert copies[3] == copies[2]

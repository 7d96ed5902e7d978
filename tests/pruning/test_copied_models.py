"""A model is copied as `copy.deepcopy` copies it: values, sharing, and what classes say of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from taylor_kernels.pruning.copies import copied


class Own(nn.Linear):
    """A class with a rule of its own for its copies."""

    def __deepcopy__(self, memo):
        new = Own(self.in_features, self.out_features)
        memo[id(self)] = new
        new.load_state_dict(self.state_dict())
        new.copies = getattr(self, "copies", 0) + 1
        return new


def model() -> nn.Module:
    first, norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
    made = nn.Sequential(first, norm, nn.PReLU(), Own(4, 4), nn.Linear(4, 4), nn.LSTM(4, 4))
    made[4].weight = first.weight
    made.table = {"norm": norm, "list": [first, norm.running_mean]}
    made.same, made.parent = made.table, (made,)
    made.register_forward_hook(lambda *_: None)
    return made


def run(made: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return made(x)[0]


@pytest.mark.parametrize("copy_of", [copied, copy.deepcopy])
def test_a_copy_has_the_values_and_the_sharing_of_the_model(copy_of):
    made = model().eval()
    new, x = copy_of(made), torch.randn(3, 4)
    assert torch.equal(run(new, x), run(made, x))
    assert new[4].weight is new[0].weight
    assert new[4].weight is not made[0].weight
    assert new.table is new.same
    assert new.table is not made.table
    assert new.table["norm"] is new[1]
    assert new.table["list"][0] is new[0]
    assert new.table["list"][1] is new[1].running_mean
    assert new.parent[0] is new
    assert new[3].copies == 1
    assert len(new._forward_hooks) == 1
    assert list(new.state_dict()) == list(made.state_dict())
    before = copy.deepcopy(made.state_dict())
    with torch.no_grad():
        for tensor in (*new.parameters(), *new.buffers()):
            tensor.zero_()
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_a_tensor_that_holds_a_graph_is_refused_as_ever():
    made = nn.Sequential(nn.Linear(2, 2))
    made.graph = made[0].weight * 2
    for copy_of in (copied, copy.deepcopy):
        with pytest.raises(RuntimeError, match="graph leaves"):
            copy_of(made)

"""A model is copied as `copy.deepcopy` copies it: values, sharing, and what classes say of it."""

from __future__ import annotations

import copy
import itertools
import random

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


def buffers(draw: random.Random) -> dict[str, torch.Tensor]:
    """Tensors of all makes, some of them parts of another's memory."""
    whole = torch.randn(4, 6, dtype=draw.choice((torch.float32, torch.float64)))
    parts = [
        whole, whole[1:3], whole.t(), whole.view(24), whole[2], torch.arange(5), torch.tensor(2.0),
        torch.randn(2, dtype=torch.cfloat).conj(), torch.zeros(0), torch.randn(3).to_sparse(),
        torch.randn(1, 2, 3, 3).to(memory_format=torch.channels_last), torch.ones(1).expand(4),
    ]  # fmt: skip
    draw.shuffle(parts)
    return {f"b{number}": part for number, part in enumerate(parts)}


@pytest.mark.parametrize("seed", range(20))
def test_buffers_are_copied_as_they_lie_and_share_what_they_shared(seed):
    made, draw = nn.Module(), random.Random(seed)
    for name, buffer in buffers(draw).items():
        if draw.random() < 0.5:
            made.register_buffer(name, buffer)
        else:
            setattr(made, name, [buffer] if draw.random() < 0.5 else buffer)

    def tensors(module: nn.Module) -> list[torch.Tensor]:
        found = [getattr(module, f"b{number}") for number in range(12)]
        return [one[0] if isinstance(one, list) else one for one in found]

    old, new, expected = tensors(made), tensors(copied(made)), tensors(copy.deepcopy(made))
    for mine, theirs, source in zip(new, expected, old, strict=True):
        assert mine is not source
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        assert mine.layout == theirs.layout
        if mine.layout is torch.strided:
            assert mine.stride() == theirs.stride()
    dense = [n for n, one in enumerate(old) if one.layout is torch.strided and one.numel()]
    for one, other in itertools.product(dense, repeat=2):
        shared = [
            t[one].untyped_storage().data_ptr() == t[other].untyped_storage().data_ptr()
            for t in (new, expected)
        ]
        assert shared[0] is shared[1]
    assert not {t.untyped_storage().data_ptr() for n, t in enumerate(new) if n in dense} & {
        old[n].untyped_storage().data_ptr() for n in dense
    }

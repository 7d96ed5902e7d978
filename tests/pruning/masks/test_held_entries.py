"""What holds masked entries writes what index_fill_ writes, wherever tensors lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from taylor_kernels.pruning.masks.held_entries import HeldEntries, zeroes_gradients

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@st.composite
def tensors(draw) -> torch.Tensor:
    """Of any order of dimensions in memory; some with gaps, some with elements in several places
    of a larger tensor."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    order = draw(st.permutations(range(len(sizes))))
    steps = [draw(st.integers(1, 2)) if draw(st.booleans()) else 1 for _ in sizes]
    wide = [sizes[dim] * steps[dim] for dim in order]
    whole = torch.randn(wide, dtype=torch.float64).to(draw(st.sampled_from(FLOATS)))
    view = whole.permute([order.index(dim) for dim in range(len(sizes))])
    return view[tuple(slice(None, None, step) for step in steps)]


@st.composite
def masked(draw) -> list[tuple[torch.Tensor, list]]:
    found = []
    for _ in range(draw(st.integers(1, 4))):
        tensor = draw(tensors())
        dims = draw(st.lists(st.integers(0, tensor.dim() - 1), min_size=1, unique=True))
        parts = []
        for dim in dims:
            some = st.lists(st.integers(0, tensor.size(dim) - 1), unique=True)
            parts.append((dim, torch.tensor(draw(some), dtype=torch.int64), draw(VALUES)))
        found.append((tensor, parts))
    return found


VALUES = st.sampled_from([0.0, 1.0, -0.3])


def filled(tensor: torch.Tensor, parts: list, zero: bool = False) -> torch.Tensor:
    expected = tensor.detach().clone()
    for dim, index, value in parts:
        expected.index_fill_(dim, index, 0.0 if zero else value)
    return expected


def module_of(held: list[torch.Tensor]) -> tuple[nn.Module, list[str]]:
    """Tensors as parameters and buffers, in modules of modules."""
    model, names = nn.Module(), []
    for number, tensor in enumerate(held):
        owner = nn.Module()
        model.add_module(f"m{number}", owner)
        if number % 2:
            owner.register_buffer("b", tensor)
        else:
            owner.register_parameter("p", nn.Parameter(tensor))
        names.append(f"m{number}.{'b' if number % 2 else 'p'}")
    return model, names


@settings(max_examples=60)
@given(given=masked())
@pytest.mark.usefixtures("way")
def test_writes_what_index_fill_does(given):
    model, names = module_of([tensor for tensor, _ in given])
    expected = [filled(*one) for one in given]
    HeldEntries(dict(zip(names, [parts for _, parts in given], strict=True))).write(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert all(torch.equal(tensors[n], e) for n, e in zip(names, expected, strict=True))


@settings(max_examples=60)
@given(given=masked())
@pytest.mark.usefixtures("way")
def test_zeroes_gradients_as_they_come(given):
    model = nn.ParameterList([nn.Parameter(tensor) for tensor, _ in given])
    hooks = HeldEntries({str(i): parts for i, (_, parts) in enumerate(given)}).zeroing()
    slopes = [torch.randn_like(parameter) for parameter in model]
    for name, parameter in model.named_parameters():
        hooks[name](parameter)  # there is none yet
        assert zeroes_gradients(hooks[name])
        parameter.register_post_accumulate_grad_hook(hooks[name])
    sum((p * s).sum().double() for p, s in zip(model, slopes, strict=True)).backward()
    for parameter, slope, (_, parts) in zip(model, slopes, given, strict=True):
        assert torch.equal(parameter.grad, filled(slope, parts, zero=True))
    assert not zeroes_gradients(filled)


@pytest.mark.usefixtures("way")
def test_a_tensor_that_others_have_cut_is_not_written_behind():
    model = nn.Sequential(nn.Linear(3, 6))
    held = HeldEntries({"0.weight": [(0, torch.tensor([1, 5]), 0.0)]})
    held.write(model)
    weight = model[0].weight
    assert not weight[[1, 5]].any()
    assert weight[[0, 2, 3, 4]].all()
    memory = torch.ones(6, 3)
    model[0].weight = nn.Parameter(memory[:4])
    with pytest.raises(IndexError, match="index 5 is out of bounds"):
        held.write(model)
    assert memory[4:].all()
    del model[0].weight
    with pytest.raises(RuntimeError, match=r"0\.weight, of which filters are masked, is gone"):
        held.write(model)

"""The file of a pruned model gives back what was written, whatever that is, and the same bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taylor_kernels.pruning.removing.removal import Removal
from taylor_kernels.tracing.blocks import Place

pytest.importorskip("safetensors", reason="pruned models are files of safetensors")

from taylor_kernels.pruning.saving.pruned_file import PrunedFile, by_first_name

NAMES = st.text("ab.0é", min_size=1, max_size=6)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    values = torch.randint(-9, 9, shape, dtype=torch.int64)
    tensor = values.to(draw(st.sampled_from(DTYPES)))
    return tensor.T if tensor.dim() == 2 and draw(st.booleans()) else tensor


@st.composite
def files(draw):
    """A state some of whose tensors have several names, and any removal that a file can hold."""
    known = draw(st.dictionaries(NAMES, tensors(), max_size=4))
    state = dict(known)
    for alias in draw(st.lists(NAMES, max_size=3)):
        if known and alias not in state:
            state[alias] = known[draw(st.sampled_from(sorted(known)))]
    shapes = draw(st.dictionaries(NAMES, st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    cuts = {
        name: {
            dim: torch.tensor(sorted(draw(st.sets(st.integers(0, size - 1)))), dtype=torch.int64)
            for dim, size in enumerate(shape)
            if draw(st.booleans())
        }
        for name, shape in shapes.items()
    }
    count = st.integers(0, 2**40)
    values = st.dictionaries(NAMES, count | st.lists(count, max_size=3), max_size=3)
    place = st.builds(
        Place,
        NAMES,
        st.none() | st.integers(0, 5) | NAMES,
        st.just(()) | st.tuples(st.integers(0, 5), st.integers(1, 6)),
    )
    attributes = draw(st.dictionaries(NAMES, values, max_size=3))
    places = draw(st.lists(place, max_size=3))
    orders = {
        name: {
            dim: torch.tensor(
                draw(st.permutations(range(shapes[name][dim] - index.numel()))), dtype=torch.int64
            )
            for dim, index in own.items()
        }
        for name, own in cuts.items()
        if draw(st.booleans())
    }
    return PrunedFile(state, shapes, Removal(cuts, attributes, tuple(places), orders))


@settings(max_examples=30)
@given(files())
def test_what_is_read_is_what_was_written(tmp_path_factory, written):
    path = tmp_path_factory.getbasetemp() / "pruned"
    written.write(path)
    data = path.read_bytes()
    found = PrunedFile.read(str(path))
    assert found.state.keys() == written.state.keys()
    for name, value in written.state.items():
        assert found.state[name].dtype == value.dtype
        assert torch.equal(found.state[name], value)
    assert by_first_name(found.state)[1].keys() == by_first_name(written.state)[1].keys()
    assert found.shapes == written.shapes
    cuts, *others, orders = written.removal
    assert list(found.removal[1:-1]) == others
    for mine, theirs in ((found.removal.cuts, cuts), (found.removal.orders, orders)):
        assert {name: own.keys() for name, own in mine.items()} == {
            name: own.keys() for name, own in theirs.items()
        }
        assert all(
            torch.equal(index, theirs[name][dim])
            for name, own in mine.items()
            for dim, index in own.items()
        )
    written.write(path)
    assert path.read_bytes() == data

"""Moves of elements: the operation itself, run on the places of each dimension."""

from __future__ import annotations

import numpy as np
import torch

from taylor_kernels.tracing.notes.attributes import counting
from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.run.calls import Call, rule


def spread(call: Call, labels: Labels, literal: bool = False) -> Labels:
    """Labels of an operation that moves elements: it is run on the places of each dimension.

    Args:
        literal: the operation names places by number: whatever it moves cannot go.
    """
    new = Labels.fixed(call.out.shape)
    source = call.arg("self", "input")
    for dim in labels.labelled:
        vector = labels.dims[dim]
        assert vector is not None
        size = labels.shape[dim]
        places = torch.arange(1, size + 1, dtype=torch.float32)
        shape = [size if i == dim else 1 for i in range(len(labels.shape))]
        coordinates = places.view(shape).expand(labels.shape)
        values = {
            name: coordinates if value is source else value for name, value in call.args.items()
        }
        result = call.again(values)
        moved = result.to(torch.int64).numpy()
        atoms = np.concatenate([np.zeros(1, np.int64), vector])[moved]
        axes = call.record.grid(atoms, call.where)
        for place, axis in enumerate(axes):
            if axis is not None:
                same = axis.size == size and np.array_equal(axis, vector)
                if literal and not same:
                    call.refuse(vector, "is taken by its number")
                    continue
                if new.dims[place] is not None:
                    axis = call.record.merge((1,), (axis,), call.where)
                new.dims[place], new.zero[place] = axis, labels.is_zero(dim)
    return new


@rule("flip", "repeat", "tile", "repeat_interleave", "fliplr", "flipud")
def moved(call: Call) -> Labels:
    """Places in another order, or several times: what one place becomes goes with it."""
    source = call.arg("self", "input")
    if call.name == "repeat_interleave" and not isinstance(call.args.get("repeats"), int):
        return spread(call, call.of(source), literal=True)
    old = call.of(source)
    new = spread(call, old)
    if call.name == "repeat":
        more = len(new.shape) - len(old.shape)
        new.loose = frozenset(
            dim
            for dim, size in enumerate(new.shape)
            if size > 1 and (dim < more or old.shape[dim - more] == 1 or dim - more in old.repeated)
        )
        new.memory.repeated = bool(new.loose)
        count_repeats(call, new)
    return new


def count_repeats(call: Call, new: Labels) -> None:
    """Note which attributes say how often one place was repeated."""
    new.counted = tuple(
        (dim, call.holder[1], attribute)
        for dim in new.loose
        for attribute in counting(call, new.shape[dim])
    )


@rule("triu", "tril")
def triangle(call: Call) -> Labels:
    """Zero on one side of a diagonal, which removal would move."""
    old = call.of(call.args["self"])
    for vector in old.dims[-2:]:
        call.refuse(vector, "is cut along a diagonal")
    return Labels(old.shape, [*old.dims[:-2], None, None], list(old.zero))


@rule("index_select", "gather", "index", "take_along_dim", "roll", "rot90", "take", "unfold_copy")
def by_number(call: Call) -> Labels:
    """Places taken by number: the dimensions that are not indexed go along."""
    source = call.arg("self", "input")
    for tensor in call.tensors:
        if tensor is not source:
            for vector in call.of(tensor).vectors():
                call.refuse(vector, "is used as an index")
    return spread(call, call.of(source), literal=True)

"""Moves of elements: the operation itself, run on the places of each dimension."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.attributes import counting
from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.run.calls import Call, rule


def spread(call: Call, labels: Labels, literal: bool = False) -> Labels:
    """Labels of an operation that moves elements: it is run on the places of each dimension.

    Args:
        literal: the operation names places by number: whatever it moves cannot go.
    """
    new = Labels.fixed(call.out.shape)
    for dim in labels.labelled:
        vector = labels.dims[dim]
        assert vector is not None
        axes = call.record.grid(_moved_atoms(call, labels, dim, vector), call.where)
        for place, axis in enumerate(axes):
            if axis is not None:
                same = axis.size == labels.shape[dim] and np.array_equal(axis, vector)
                if literal and not same:
                    call.refuse(vector, "is taken by its number")
                    continue
                if new.dims[place] is not None:
                    axis = call.record.merge((1,), (axis,), call.where)
                new.dims[place], new.zero[place] = axis, labels.is_zero(dim)
    return new


def _moved_atoms(call: Call, labels: Labels, dim: int, vector: Vector) -> Vector:
    """The atom of each element of the result, of those of one dimension of what is moved."""
    source, size = call.arg("self", "input"), labels.shape[dim]
    places = torch.arange(1, size + 1, dtype=torch.float32)
    shape = [size if i == dim else 1 for i in range(len(labels.shape))]
    coordinates = places.view(shape).expand(labels.shape)
    result = call.again(
        {name: coordinates if value is source else value for name, value in call.args.items()}
    )
    atoms: Vector = np.concatenate([np.zeros(1, np.int64), vector])
    return atoms[result.to(torch.int64).numpy()]


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


@rule("index", "take_along_dim", "roll", "rot90", "take", "unfold_copy")
def by_number(call: Call) -> Labels:
    """Places taken by number: the dimensions that are not indexed go along."""
    source = call.arg("self", "input")
    _keep_indices(call, source)
    return spread(call, call.of(source), literal=True)


@rule("index_select", "gather")
def along_one(call: Call) -> Labels:
    """The same along one dimension: nothing need be run on the places, of which a table of
    relative positions has millions."""
    source, index = call.args["self"], call.args["index"]
    _keep_indices(call, source)
    old, new = call.of(source), Labels.fixed(call.out.shape)
    along = call.args["dim"] % max(len(old.shape), 1)
    for dim in old.labelled:
        vector, size = old.dims[dim], old.shape[dim]
        assert vector is not None
        same = _is_every(index, dim, size) if dim == along else new.shape[dim] == size
        if same:
            new.dims[dim], new.zero[dim] = vector, old.is_zero(dim)
        else:
            call.refuse(vector, "is taken by its number")
    return new


def _is_every(index: Tensor, dim: int, size: int) -> bool:
    """Whether an index names every place of a dimension in order, so that it moves none."""
    along = dim if index.dim() > 1 else 0
    if not index.dim() or index.size(along) != size:
        return False
    places = torch.arange(size, device=index.device)
    shape = [-1 if i == along else 1 for i in range(index.dim())]
    return bool((index == places.view(shape)).all())


def _keep_indices(call: Call, source: Any) -> None:
    """What is an index cannot go."""
    for tensor in call.tensors:
        if tensor is not source:
            for vector in call.of(tensor).vectors():
                call.refuse(vector, "is used as an index")

"""Views and reshapes: the operation itself, run on the label vectors.

A vector becomes a tensor of the data's shape whose other strides are zero, the operation is run on
that, and the strides of the result say where the labels are now. Reshapes are worked out on the
sizes, since their sizes say which parts a dimension was cut into.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from taylor_kernels.tracing.attributes import tie
from taylor_kernels.tracing.labels import Labels
from taylor_kernels.tracing.record import Cut, Vector
from taylor_kernels.tracing.recorder import Call, rule, tensors_of


_SLICES = {
    "slice", "narrow", "split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk",
    "unsafe_split_with_sizes", "tensor_split", "hsplit", "vsplit",
}  # fmt: skip


@rule(
    "permute", "transpose", "t", "numpy_T", "mT", "matrix_H", "adjoint", "movedim", "moveaxis",
    "swapaxes", "swapdims", "squeeze", "unsqueeze", "select", "slice", "narrow", "split", "chunk",
    "split_with_sizes", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes", "tensor_split",
    "expand", "unbind", "detach", "alias", "diagonal", "unfold", "view_as", "_reshape_alias_copy",
    "hsplit", "vsplit", "lift",
)  # fmt: skip
def view(call: Call) -> list[Labels | None]:
    """A view that says by dimension what it takes."""
    source: Tensor = call.arg("self", "input", "tensor")
    if call.name == "view_as":
        return [reshaped(call, call.of(source), call.out.shape)]
    old = call.of(source)
    if call.name in ("detach", "alias", "lift"):
        return [replace(old)]
    outs = [Labels.fixed(out.shape) for out in tensors_of(call.out)]
    for new in outs:
        new.memory, new.uniform = old.memory, old.uniform
        new.name = old.name
    for dim, vector in enumerate(old.dims):
        if vector is not None and (old.uniform or vector.any()):
            _follow(call, source, old, dim, vector, outs)
    return list(outs)


def _follow(
    call: Call, source: Tensor, old: Labels, dim: int, vector: Vector, outs: list[Labels]
) -> None:
    """Carry the labels of one dimension into the results."""
    size = old.shape[dim]
    step = vector.strides[0] // vector.itemsize if size > 1 else 1
    labels = torch.from_numpy(vector)
    strides = [step if i == dim else 0 for i in range(len(old.shape))]
    spread = labels.as_strided(old.shape, strides, labels.storage_offset())
    rest = {
        name: spread if value is source else value for name, value in call.args.items()
    }
    results = tensors_of(call.func(*_positional(call, rest), **_keywords(call, rest)))
    parts, whole = [], True
    for result, new in zip(results, outs, strict=True):
        places = [i for i in range(result.dim()) if result.stride(i) and result.size(i) > 1]
        if not places:
            places = _single(call, size, dim, step, result)
        if not places:
            text = "is taken by its number" if size > 1 else "is a single channel that is broadcast"
            call.refuse(vector, text)
            continue
        if len(places) > 1:
            shape, stride = result.shape, result.stride()
            core = result.as_strided(
                [shape[i] for i in places], [stride[i] for i in places], result.storage_offset()
            )
            for i, axis in zip(places, call.record.grid(core.numpy(), call.where), strict=True):
                new.dims[i], new.zero[i] = axis, old.zero[dim]
            continue
        place = places[0]
        part = result.as_strided(
            (result.size(place),), (result.stride(place),), result.storage_offset()
        )
        new.dims[place], new.zero[place] = part.numpy(), old.zero[dim]
        if part.numel() < size:
            whole = False
        start = (result.storage_offset() - labels.storage_offset()) // step
        parts.append((start, part.numel(), part.stride(0) // step if part.numel() > 1 else 1))
    if not whole and vector.any():
        _cut(call, source, vector, parts)


def _single(call: Call, size: int, dim: int, step: int, result: Tensor) -> list[int]:
    """Where a dimension of which one place is left went."""
    if call.name in _SLICES and result.size(dim) == 1:
        return [dim]
    ones = [i for i in range(result.dim()) if result.size(i) == 1 and result.stride(i) == step]
    return ones[-1:] if size == 1 else []


def _cut(
    call: Call, source: Tensor, vector: Vector, parts: list[tuple[int, int, int]]
) -> None:
    """Write down which parts of a dimension were taken."""
    record = call.record
    every = max(step for _, _, step in parts)
    if every > 1:
        # Every k-th place: the k places of a period go together.
        if vector.size % every:
            call.refuse(vector, "is taken by a step that does not divide its width")
            return
        rows = vector.reshape(-1, every)
        for column in range(1, every):
            call.join(rows[:, 0], rows[:, column])
        return
    spans = tuple((start, start + size) for start, size, _ in parts)
    inner = tuple(span for span in spans if span != (0, vector.size))
    tied = all([tie(call, stop - start, vector[start:stop]) for start, stop in inner[:-1]] or [True])
    if len(inner) == 1 and len(spans) == 1:
        start, stop = inner[0]
        tied = tie(call, stop - start, vector[start:stop])
        if start and not tied:
            tied = tie(call, start, vector[:start])
    key = (vector.ctypes.data, vector.size)
    equal = call.name in ("chunk", "unsafe_chunk", "unbind")
    record.cuts.append(Cut(vector, inner, key, equal, tied, call.where))


def _positional(call: Call, values: dict[str, Any]) -> list[Any]:
    return [
        values[argument.name]
        for argument in call.func._schema.arguments
        if not argument.kwarg_only
    ]


def _keywords(call: Call, values: dict[str, Any]) -> dict[str, Any]:
    return {
        argument.name: values[argument.name]
        for argument in call.func._schema.arguments
        if argument.kwarg_only and argument.name in values
    }


@rule(
    "view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "view_copy",
    "reshape_as", "ravel",
)  # fmt: skip
def reshape(call: Call) -> Labels:
    """Other sizes for the same elements in the same order."""
    old = call.of(call.args["self"])
    if call.name == "view" and "dtype" in call.args:
        if len(old.shape) == call.out.dim() and old.shape == tuple(call.out.shape):
            return old
        for vector in old.vectors():
            call.refuse(vector, "is read as another data type")
        return Labels.fixed(call.out.shape)
    sizes = call.arg("size", "shape", "sizes")
    inferred: tuple[int, ...] = ()
    if call.name in ("view", "reshape") and sizes is not None:
        inferred = tuple(i for i, size in enumerate(sizes) if size == -1)
    elif call.name == "unflatten" and sizes is not None:
        dim = call.args["dim"] % len(old.shape)
        inferred = tuple(dim + i for i, size in enumerate(sizes) if size == -1)
    return reshaped(call, old, call.out.shape, inferred)


def reshaped(
    call: Call,
    old: Labels,
    shape: Sequence[int],
    inferred: tuple[int, ...] = (),
    allowed: Collection[int] | None = None,
) -> Labels:
    """The labels of a tensor seen with another shape.

    Args:
        inferred: dimensions whose size the caller left to PyTorch (-1).
        allowed: the only dimensions that may shrink; None to see from sizes and attributes.
    """
    new = Labels.fixed(shape)
    new.memory, new.uniform = old.memory, old.uniform
    if not old.labelled and not old.uniform:
        return new
    if old.shape == new.shape:
        new.dims, new.zero, new.name = list(old.dims), list(old.zero), old.name
        for dim in old.labelled:
            if dim not in inferred:
                tie(call, new.shape[dim], new.dims[dim], index=1, weak=True)
        return new
    if old.uniform:
        new.dims = [np.zeros(size, np.int64) for size in new.shape]
        new.zero = [all(old.zero)] * len(new.shape)
        return new
    for ours, theirs in segments(old.shape, new.shape):
        labelled = [i for i in ours if i in old.labelled]
        if not labelled:
            continue
        zero = all(old.zero[i] for i in labelled)
        if len(ours) == 1 and len(theirs) == 1:
            new.dims[theirs[0]], new.zero[theirs[0]] = old.dims[ours[0]], zero
            if theirs[0] not in inferred:
                tie(call, new.shape[theirs[0]], old.dims[ours[0]], index=1, weak=True)
            continue
        sizes = [old.shape[i] for i in ours]
        flat = call.record.merge(sizes, [old.dims[i] for i in ours], call.where)
        assert flat is not None
        if len(theirs) == 1:
            axes: list[Vector | None] = [flat]
        elif not theirs:
            call.refuse(flat, "is a single channel whose dimension is dropped")
            continue
        else:
            grid = flat.reshape([new.shape[i] for i in theirs])
            if allowed is None:
                may = _may_shrink(call, grid, theirs, inferred)
            else:
                may = [place for place, i in enumerate(theirs) if i in allowed]
            axes = call.record.grid(grid, call.where, allowed=may)
        for i, axis in zip(theirs, axes, strict=True):
            if axis is not None:
                new.dims[i], new.zero[i] = axis, zero
                if i not in inferred:
                    tie(call, new.shape[i], axis, index=theirs.index(i) if len(theirs) > 1 else 1)
    return new


def _may_shrink(
    call: Call, grid: Vector, theirs: Sequence[int], inferred: Sequence[int]
) -> list[int]:
    """Which axes of a new grid the code that made it lets shrink.

    One that PyTorch infers does, one that an attribute counts can be made to. Of the others the
    widest was worked out from the width, unless PyTorch had to infer one: they are constants then.
    """
    may, unknown = [], []
    for place, i in enumerate(theirs):
        if i in inferred:
            may.append(place)
        elif tie(call, grid.shape[place], None, index=place):
            may.append(place)
        elif grid.shape[place] > 1:
            unknown.append(place)
    if unknown and not any(i in inferred for i in theirs):
        may.append(max(unknown, key=lambda place: (grid.shape[place], place)))
    return may


def segments(
    old: Sequence[int], new: Sequence[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """The finest runs of dimensions that hold the same elements: old ones and new ones."""
    i = j = 0
    while i < len(old) or j < len(new):
        ours, theirs = [], []
        left = right = 1
        # Single dimensions that stay as they are come first, those of size one included.
        while not ours and not theirs or left != right:
            if i < len(old) and (left <= right or j >= len(new)):
                ours.append(i)
                left *= old[i]
                i += 1
            elif j < len(new):
                theirs.append(j)
                right *= new[j]
                j += 1
            else:
                break
        # The loop began with an old dimension: one of size one may stand alone on either side.
        if not theirs and j < len(new) and (left == new[j]):
            theirs.append(j)
            j += 1
        yield ours, theirs


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
            name: tree_map(lambda v: coordinates if v is source else v, value)
            for name, value in call.args.items()
        }
        result = call.func(*_positional(call, values), **_keywords(call, values))
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


@rule("flip", "repeat", "tile", "triu", "tril", "repeat_interleave", "fliplr", "flipud")
def moved(call: Call) -> Labels:
    source = call.arg("self", "input")
    if call.name == "repeat_interleave" and not isinstance(call.args.get("repeats"), int):
        return spread(call, call.of(source), literal=True)
    return spread(call, call.of(source))


@rule("index_select", "gather", "index", "take_along_dim", "roll", "rot90", "take", "unfold_copy")
def by_number(call: Call) -> Labels:
    """Places taken by number: the dimensions that are not indexed go along."""
    source = call.arg("self", "input")
    for tensor in call.tensors:
        if tensor is not source:
            for vector in call.of(tensor).vectors():
                call.refuse(vector, "is used as an index")
    return spread(call, call.of(source), literal=True)

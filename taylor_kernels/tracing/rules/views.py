"""Views and moves of elements: the operation itself, run on the label vectors.

A vector becomes a tensor of the data's shape whose other strides are zero, the operation is run on
that, and the strides of the result say where the labels are now.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taylor_kernels.tracing.attributes import counting, tie, tie_parts
from taylor_kernels.tracing.calls import Call, rule
from taylor_kernels.tracing.labels import Labels, has_atoms
from taylor_kernels.tracing.operations import tensors_of
from taylor_kernels.tracing.record import Cut, Size, Vector
from taylor_kernels.tracing.rules.axes import Axes, find_axes
from taylor_kernels.tracing.rules.reshapes import reshaped

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
    outs = [Labels.fixed(out.shape) for out in call.outs]
    for new in outs:
        new.memory, new.uniform = old.memory, old.uniform
        new.name, new.computed = old.name, old.computed
    if call.name == "expand":
        more = len(outs[0].shape) - len(old.shape)
        widths = (*[0] * more, *old.shape)
        outs[0].loose = frozenset(
            dim
            for dim, (size, now) in enumerate(zip(widths, outs[0].shape, strict=True))
            if size != now or dim - more in old.repeated
        )
        outs[0].memory.repeated |= bool(outs[0].loose)
        _count_loose(call, outs[0])
    axes = find_axes(call, old.shape) if old.shape else None
    for dim, vector in enumerate(old.dims):
        if vector is None or not (old.uniform or has_atoms(vector)):
            continue
        if axes is None or vector.size < 2:
            _follow(call, source, old, dim, vector, outs)
        else:
            _place(call, source, old, dim, vector, outs, axes)
        if call.name == "squeeze" and vector.size > 1 and _squeezes(call, dim, len(old.shape)):
            call.record.squeezed.append(vector.copy())
    return list(outs)


def _squeezes(call: Call, dim: int, dims: int) -> bool:
    """Whether a squeeze would drop this dimension if it were of one place."""
    named = call.args.get("dim")
    if named is None:
        return True
    places = named if isinstance(named, (list, tuple)) else [named]
    return any(type(place) is int and place % dims == dim for place in places)


def _place(
    call: Call, source: Tensor, old: Labels, dim: int, vector: Vector, outs: list[Labels],
    axes: Axes,
) -> None:  # fmt: skip
    """Carry the labels of one dimension to where the arguments say that it goes."""
    place, parts = axes.order[dim], []
    for number, new in enumerate(outs):
        part = vector
        if dim == axes.cut and new.shape[dim] < vector.size:
            start = axes.starts[number]
            part = vector[start : start + new.shape[dim]]
            parts.append((start, part.size, 1))
        new.dims[place], new.zero[place] = part, old.zero[dim]
    if parts and has_atoms(vector):
        _cut(call, source, vector, parts)


def _follow(
    call: Call, source: Tensor, old: Labels, dim: int, vector: Vector, outs: list[Labels]
) -> None:
    """Carry the labels of one dimension into the results."""
    size = old.shape[dim]
    step = vector.strides[0] // vector.itemsize if size > 1 else 1
    labels = torch.from_numpy(vector)
    strides = [step if i == dim else 0 for i in range(len(old.shape))]
    spread = labels.as_strided(old.shape, strides, labels.storage_offset())
    rest = {name: spread if value is source else value for name, value in call.args.items()}
    results = tensors_of(_again(call, rest))
    parts, whole = [], True
    for result, new in zip(results, outs, strict=True):
        places = [i for i in range(result.dim()) if result.stride(i) and result.size(i) > 1]
        if not places:
            places = _single(call, size, dim, step, result)
        if not places and call.name in _SLICES and result.numel() == 0 < source.numel():
            continue  # behind the last: there is none there without some of them either
        if not places:
            text = "is taken by its number" if size > 1 else "is a single channel that is broadcast"
            if call.name == "select":
                # Code may take any one channel to see how large all are.
                new.kept_if_read += ((vector, call.reason(text)),)
            else:
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


def _cut(call: Call, source: Tensor, vector: Vector, parts: list[tuple[int, int, int]]) -> None:
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
    # Code that lists the sizes of parts gives that of the last one too.
    named = inner if call.name.endswith("split_with_sizes") else inner[:-1]
    tied = len(spans) > 1 and tie_parts(call, vector, spans)
    if tied:
        # The list may hold these sizes by chance, and the code have them from elsewhere.
        for start, stop in named:
            record.guesses += _counting(call, vector[start:stop].copy())
    else:
        ties = [tie(call, stop - start, vector[start:stop]) for start, stop in named]
        tied = all(ties[: len(inner) - 1])
    if len(inner) == 1 and len(spans) == 1:
        start, stop = inner[0]
        tied = tie(call, stop - start, vector[start:stop])
        if start and not tied:
            tied = tie(call, start, vector[:start])
    key = (vector.__array_interface__["data"][0], vector.size)
    equal = call.name in ("chunk", "unsafe_chunk", "unbind")
    others = () if equal or (tied and len(spans) > 1) else _others(call, vector, spans)
    sizes = _counting(call, vector[inner[-1][0] :]) if others and len(spans) > 1 else []
    record.cuts.append(Cut(vector, inner, key, equal, tied, call.where, others, tuple(sizes)))


def _counting(call: Call, part: Vector) -> list[Size]:
    """What attributes of the running module may say of the width of a part."""
    module = call.holder[1]
    return [Size(module, attribute, part, False) for attribute in counting(call, part.size)]


def _others(
    call: Call, vector: Vector, spans: Sequence[tuple[int, int]]
) -> tuple[Vector | None, ...]:
    """`Cut.others` where a dimension is split into parts of unlike sizes, or one is sliced off."""
    sizes = [stop - start for start, stop in spans]
    if len(spans) > 1 and (len(set(sizes)) < 2 or sum(sizes) < vector.size):
        return ()
    found: list[Vector | None] = []
    for start, stop in spans:
        part = vector[start:stop]
        counts = part.size > 1 and bool(counting(call, part.size))
        wide = [part] if counts else call.recorder.as_wide(part)
        if _is_rest(call) and not counts:
            # What goes of it goes by what it meets; that it is as wide says that the code knows so.
            found.append(part if wide else part[:0])
        else:
            found.append(wide[0] if wide and part.size > 1 else None)
    return tuple(found)


def _is_rest(call: Call) -> bool:
    """Whether a part is what others leave: `y[d:]` and `y[d:-3]`, but not `y[-3:]`."""
    if call.name != "slice":
        return False
    start, end = (call.args.get(name) for name in ("start", "end"))
    open_end = end is None or end == sys.maxsize or end < 0
    return open_end and (start is None or start >= 0)


def _again(call: Call, values: dict[str, Any]) -> Any:
    """Run the operation on other values."""
    known = call.operation
    return call.func(
        *(values[name] for name in known.arguments if name not in known.keywords),
        **{name: values[name] for name in known.keywords if name in values},
    )


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
        result = _again(call, values)
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
        _count_loose(call, new)
    return new


def _count_loose(call: Call, new: Labels) -> None:
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


@rule("view_as_real", "view_as_complex")
def parts_of_complex(call: Call) -> Labels:
    """A last dimension more, or one less, of real and imaginary parts."""
    old = call.of(call.args["self"])
    if call.name == "view_as_real":
        shape, dims, zero = (*old.shape, 2), [*old.dims, None], [*old.zero, False]
    else:
        call.refuse(old.dims[-1], "is a part of a complex number")
        shape, dims, zero = old.shape[:-1], old.dims[:-1], old.zero[:-1]
    return Labels(shape, dims, zero, memory=old.memory)


@rule("index_select", "gather", "index", "take_along_dim", "roll", "rot90", "take", "unfold_copy")
def by_number(call: Call) -> Labels:
    """Places taken by number: the dimensions that are not indexed go along."""
    source = call.arg("self", "input")
    for tensor in call.tensors:
        if tensor is not source:
            for vector in call.of(tensor).vectors():
                call.refuse(vector, "is used as an index")
    return spread(call, call.of(source), literal=True)

"""Views: the operation itself, run on the label vectors.

A vector becomes a tensor of the data's shape whose other strides are zero, the operation is run on
that, and the strides of the result say where the labels are now.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.labels import Labels, has_atoms
from taylor_kernels.tracing.notes.operations import tensors_of
from taylor_kernels.tracing.rules.axes import Axes, find_axes
from taylor_kernels.tracing.rules.moves import count_repeats
from taylor_kernels.tracing.rules.parts import note_parts
from taylor_kernels.tracing.run.calls import Call, rule

_SLICES = {
    "slice", "narrow", "split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk",
    "unsafe_split_with_sizes", "tensor_split", "hsplit", "vsplit",
}  # fmt: skip


@rule(
    "permute", "transpose", "t", "numpy_T", "mT", "matrix_H", "adjoint", "movedim", "moveaxis",
    "swapaxes", "swapdims", "squeeze", "unsqueeze", "select", "slice", "narrow", "split", "chunk",
    "split_with_sizes", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes", "tensor_split",
    "expand", "unbind", "detach", "alias", "diagonal", "unfold", "_reshape_alias_copy",
    "hsplit", "vsplit", "lift",
)  # fmt: skip
def view(call: Call) -> list[Labels | None]:
    """A view that says by dimension what it takes."""
    source: Tensor = call.arg("self", "input", "tensor")
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
        count_repeats(call, outs[0])
    axes = find_axes(call, old.shape) if old.shape else None
    for dim, vector in enumerate(old.dims):
        if vector is None or not (old.uniform or has_atoms(vector)):
            continue
        if axes is None or vector.size < 2:
            _follow(call, source, old, dim, vector, outs)
        else:
            _place(call, old, dim, vector, outs, axes)
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
    call: Call, old: Labels, dim: int, vector: Vector, outs: list[Labels], axes: Axes
) -> None:
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
        note_parts(call, vector, parts)


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
    results = tensors_of(call.again(rest))
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
        note_parts(call, vector, parts)


def _single(call: Call, size: int, dim: int, step: int, result: Tensor) -> list[int]:
    """Where a dimension of which one place is left went."""
    if call.name in _SLICES and result.size(dim) == 1:
        return [dim]
    ones = [i for i in range(result.dim()) if result.size(i) == 1 and result.stride(i) == step]
    return ones[-1:] if size == 1 else []


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

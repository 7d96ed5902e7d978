"""Reshapes: worked out on the sizes, which say into what parts a dimension was cut."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from math import prod

import numpy as np

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.attributes import counting, guess, tie, tie_shape
from taylor_kernels.tracing.notes.labels import Labels, has_atoms
from taylor_kernels.tracing.rules.new_axes import may_be_groups, may_shrink
from taylor_kernels.tracing.run.calls import Call, rule

#: Operations that work out all sizes of what they reshape from those of their operands.
_PRODUCTS = ("einsum", "tensordot")


@rule("view_as", "reshape_as")
def as_another(call: Call) -> Labels:
    """The sizes of another tensor: each is what is left there."""
    old, other = call.of(call.args["self"]), call.of(call.args["other"])
    every = tuple(range(call.out.dim()))
    new = reshaped(call, old, call.out.shape, every, every)
    if not (new.is_uniform or other.is_uniform):
        for dim, vector in enumerate(new.dims):
            if vector is not None and dim not in new.repeated:
                call.join(vector, other.dims[dim])
    return new


@rule(
    "view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "view_copy",
    "ravel",
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
    if call.recorder.composite in _PRODUCTS:
        every = tuple(range(call.out.dim()))
        return reshaped(call, old, call.out.shape, every, every)
    sizes = call.arg("size", "shape", "sizes")
    inferred: tuple[int, ...] = ()
    if call.name in ("view", "reshape") and sizes is not None:
        inferred = tuple(i for i, size in enumerate(sizes) if size == -1)
    elif call.name == "unflatten" and sizes is not None:
        dim = call.args["dim"] % len(old.shape)
        inferred = tuple(dim + i for i, size in enumerate(sizes) if size == -1)
    new = reshaped(call, old, call.out.shape, inferred)
    if old.labelled:
        tie_shape(call, new.shape, new.dims)
    return new


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
    atoms = set(old.labelled)
    if not atoms and not old.uniform:
        return new
    if old.shape == new.shape:
        new.dims, new.zero, new.name = list(old.dims), list(old.zero), old.name
        new.computed = old.computed
        for dim in sorted(atoms):
            if dim not in inferred:
                _tie_whole(call, new.shape[dim], old.dims[dim])
        return new
    if old.uniform:
        new.dims = [np.zeros(size, np.int64) for size in new.shape]
        new.zero = [all(old.zero)] * len(new.shape)
        if not atoms:
            return new
    for ours, theirs in segments(old.shape, new.shape):
        labelled = [i for i in ours if i in atoms]
        if not labelled:
            _stay_repeated(old, new, ours, theirs)
            continue
        zero = all(old.zero[i] for i in labelled)
        if len(ours) == 1 and len(theirs) == 1:
            place, vector = theirs[0], old.dims[ours[0]]
            assert vector is not None
            new.dims[place], new.zero[place] = vector, zero
            if place not in inferred:
                # An attribute may be of this size by chance, so that the size is another tensor's.
                doubt = int(_tie_whole(call, new.shape[place], vector))
                if vector.size > 1:
                    call.recorder.echo(vector, call.where, doubt)
                if may_be_groups(call, old.shape, new.shape, ours[0], place, inferred, allowed):
                    call.refuse(vector, "becomes as many groups of one, or stays what it is")
            continue
        sizes, vectors = [old.shape[i] for i in ours], [old.dims[i] for i in ours]
        first = vectors[0]
        dropped = 0 if first is None else _counting_repeats(first, [new.shape[i] for i in theirs])
        if first is not None and dropped:
            # What was examples * heads becomes examples, which have no atoms, and heads.
            sizes[0] //= prod(new.shape[i] for i in theirs[:dropped])
            vectors[0], theirs = first[: sizes[0]], theirs[dropped:]
        shrunk = [new.shape[i] for i in theirs]
        times = _examples_in_front(sizes, vectors, shrunk)
        if times > 1:
            front = next(i for i, vector in enumerate(vectors) if _has_some(vector))
            sizes, vectors = sizes[front:], vectors[front:]
            shrunk[0] //= times
        flat = call.record.merge(sizes, vectors, call.where)
        assert flat is not None
        if len(theirs) == 1:
            axes: list[Vector | None] = [flat]
            if theirs[0] not in inferred:
                # Heads put side by side: as wide as the stream by the code's own words, mostly.
                doubt = 2 * bool(counting(call, new.shape[theirs[0]], index=1))
                call.recorder.echo(flat, call.where, doubt)
        elif not theirs:
            call.refuse(flat, "is a single channel whose dimension is dropped")
            continue
        else:
            grid = flat.reshape(shrunk)
            if allowed is None:
                may = may_shrink(call, grid, theirs, inferred)
            else:
                may = [place for place, i in enumerate(theirs) if i in allowed]
            axes = call.record.grid(grid, call.where, allowed=may)
            if not any(i in inferred for i in theirs):
                _echo_parts(call, flat, grid.shape, axes)
        for i, axis in zip(theirs, axes, strict=True):
            if axis is not None:
                new.dims[i] = axis if axis.size == new.shape[i] else np.tile(axis, times)
                new.zero[i] = zero
                parts = len(theirs) > 1 or dropped > 0
                if i not in inferred:
                    place = theirs.index(i) if parts else 1
                    tie(call, axis.size, axis, index=place, settings=parts)
                if parts:
                    guess(call, axis.size, axis, inferred=i in inferred)
    if old.name and all(any(map(partial(np.array_equal, v), old.vectors())) for v in new.vectors()):
        new.name, new.computed = old.name, old.computed  # dimensions of size 1 came or went
    return new


def _has_some(vector: Vector | None) -> bool:
    return vector is not None and has_atoms(vector)


def _examples_in_front(
    old: Sequence[int], vectors: Sequence[Vector | None], new: Sequence[int]
) -> int:
    """How many examples the first of new dimensions holds for each of its heads.

    `q.reshape(examples * heads, width, -1)` of [examples, heads * width, ...]: the heads come again
    for every example, and it is their number that the code has from an attribute.

    Args:
        old: sizes of the old dimensions.
        vectors: their atoms.
        new: sizes of the new ones.
    """
    front = next(i for i, vector in enumerate(vectors) if _has_some(vector))
    examples = prod(old[:front])
    several = len(new) > 1 and new[0] > examples and not new[0] % examples
    return examples if several else 1


def _counting_repeats(vector: Vector, sizes: Sequence[int]) -> int:
    """How many of the new dimensions, from the first, only count how often the atoms of the first
    old one come again."""
    found, times = 0, 1
    for place, size in enumerate(sizes[:-1] if has_atoms(vector) else (), 1):
        times *= size
        if vector.size % times or vector.size == times:
            break
        if times > 1 and (vector.reshape(times, -1) == vector[: vector.size // times]).all():
            found = place
    return found


def _echo_parts(
    call: Call, flat: Vector, sizes: Sequence[int], axes: Sequence[Vector | None]
) -> None:
    """All of a dimension that is cut, or what is in each of its first parts, may be as wide as
    another tensor: `qkv.view(n, t, 3, heads, width // heads)`.

    Doubtful, as any of the sizes may be a constant.
    """
    call.recorder.echo(flat, call.where, 3)
    for begin in range(1, len(sizes) - 1):
        if call.recorder.frame.meets(prod(sizes[begin:])):
            part = call.record.merge(sizes[begin:], axes[begin:], call.where)
            if part is not None:
                call.recorder.echo(part, call.where, 3)


def _tie_whole(call: Call, size: int, vector: Vector | None) -> bool:
    """`tie` for a dimension that stays as it is."""
    if vector is not None:
        guess(call, size, vector)
    return tie(call, size, vector, index=1, weak=True)


def _stay_repeated(old: Labels, new: Labels, ours: Sequence[int], theirs: Sequence[int]) -> None:
    """One place that was repeated, behind or before dimensions of size one, is so still."""
    wide = [i for i in ours if old.shape[i] > 1]
    places = [i for i in theirs if new.shape[i] > 1]
    if len(wide) == len(places) == 1 and wide[0] in old.repeated:
        new.loose |= {places[0]}
        new.counted += tuple((places[0], m, a) for dim, m, a in old.counted if dim == wide[0])


def segments(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The finest runs of dimensions that hold the same elements: old ones and new ones."""
    i = j = 0
    while i < len(old) or j < len(new):
        ours: list[int] = []
        theirs: list[int] = []
        left = right = 1
        # Single dimensions that stay as they are come first, those of size one included.
        while (not ours and not theirs) or left != right:
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

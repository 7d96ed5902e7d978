"""Writes to places that a tensor names by their numbers, or by a mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.rules.elementwise import meet, merged_vector, repeated_as
from taylor_kernels.tracing.run.calls import Call, rule

_INDEX = "is used as an index"
_NUMBER = "is written by its number"


@rule(
    "index_add", "index_copy", "index_reduce", "index_fill", "scatter", "scatter_add",
    "scatter_reduce",
)  # fmt: skip
def along_one(call: Call) -> Labels:
    """Places along one dimension are written by their numbers; the other dimensions go along."""
    old = call.of(call.args["self"])
    along = call.args["dim"] % max(len(old.shape), 1)
    for vector in call.of(call.args["index"]).vectors():
        call.refuse(vector, _INDEX)
    source = call.arg("source", "src", "value")
    # index_fill takes no more than a scalar, which may be a tensor.
    given = call.of(source) if isinstance(source, Tensor) and source.dim() else None
    result = Labels.fixed(old.shape)
    for dim in range(len(old.shape)):
        places = list(range(len(given.shape))) if given is not None else []
        if dim == along:
            call.refuse(old.dims[dim], _NUMBER)
            if given is not None:
                call.refuse(given.dims[dim], _NUMBER)
        elif given is not None and dim in places and given.shape[dim] == old.shape[dim]:
            _beside(call, result, old, given, dim, dim)
        elif given is None:
            _scalar(call, result, old, dim)
        else:
            call.refuse(old.dims[dim], _NUMBER)
            call.refuse(given.dims[dim] if dim in places else None, _NUMBER)
    return result


def _beside(call: Call, result: Labels, old: Labels, given: Labels, dim: int, theirs: int) -> None:
    """What is written has the places of this dimension, in the same order."""
    parts = [(old, dim), (given, theirs)]
    here = [labels.dims[i] for labels, i in parts if not labels.is_uniform]
    result.dims[dim] = merged_vector(call, here)
    result.zero[dim] = all(labels.is_zero(i) for labels, i in parts)
    if old.is_uniform:
        repeated_as(call, result.dims[dim], old, dim)


def _scalar(call: Call, result: Labels, old: Labels, dim: int) -> None:
    """One value is written to all places of this dimension, or to none of a row."""
    result.dims[dim] = old.dims[dim]
    result.zero[dim] = old.is_zero(dim) and call.arg("value") == 0


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(call: Call) -> Labels | None:
    """A mask of the tensor's own shape works element by element; else one index names places, or
    several do, side by side, of the dimensions that they stand at."""
    target, values = call.args["self"], call.args["values"]
    old, given = call.of(target), call.of(values)
    found = [(place, i) for place, i in enumerate(call.args["indices"]) if i is not None]
    if not found or not _side_by_side(found):
        call.refuse_all("is written by several indices")
        return None
    place, index = found[0]
    mask = index.dtype in (torch.bool, torch.uint8)
    if mask and index.shape == target.shape and values.numel() == 1:
        for vector in given.vectors():
            call.refuse(vector, "is a single channel that is broadcast")
        result = meet(call, [target, index], old.shape)
        result.zero = [False] * len(old.shape)
        return result
    for _, index in found:
        for vector in call.of(index).vectors():
            call.refuse(vector, _INDEX)
    covered = index.dim() if mask else len(found)
    named = 1 if mask else max(index.dim() for _, index in found)
    written = len(old.shape) - covered + named  # dimensions
    result = Labels.fixed(old.shape)
    for dim in range(len(old.shape)):
        if place <= dim < place + covered:
            call.refuse(old.dims[dim], _NUMBER)
            continue
        back = dim - len(old.shape) if dim >= place else dim - written
        wide = len(given.shape) >= -back and given.shape[back] == old.shape[dim]
        if wide and old.shape[dim] > 1:
            _beside(call, result, old, given, dim, back + len(given.shape))
        else:
            result.dims[dim] = old.dims[dim]
            if len(given.shape) >= -back:
                call.refuse(given.dims[back], "is a single channel that is broadcast")
    # The dimensions that stand in the place of those that the index covers.
    covers = range(place - written, place - len(old.shape) + covered)
    for back in covers:
        if len(given.shape) >= -back:
            call.refuse(given.dims[back], _NUMBER)
    return result


@rule("masked_scatter")
def masked_scatter(call: Call) -> Labels:
    """Entries of a source, in order, go where a mask is true: whole rows where the mask is the
    same along the last dimensions, as that of the tokens which an image takes."""
    old, mask = call.of(call.args["self"]), call.args["mask"]
    given = call.of(call.args["source"])
    for vector in call.of(mask).vectors():
        call.refuse(vector, _INDEX)
    result = Labels.fixed(old.shape)
    rows = True  # the mask names whole rows of what is behind this dimension
    for back in range(-1, -len(old.shape) - 1, -1):
        dim = len(old.shape) + back
        rows = rows and _is_same_along(call, mask, back)
        wide = len(given.shape) >= -back and given.shape[back] == old.shape[dim]
        rows = rows and wide
        if rows:
            _beside(call, result, old, given, dim, len(given.shape) + back)
        else:
            call.refuse(old.dims[dim], _NUMBER)
            call.refuse(given.dims[back] if len(given.shape) >= -back else None, _NUMBER)
    for before in given.dims[: max(len(given.shape) - len(old.shape), 0)]:
        call.refuse(before, _NUMBER)
    return result


def _is_same_along(call: Call, mask: Tensor, back: int) -> bool:
    """Whether a mask has one value along a dimension, counted from the end."""
    if mask.dim() < -back or mask.size(back) == 1 or mask.stride(back) == 0:
        return True
    return mask.dim() + back in call.of(mask).repeated


def _side_by_side(found: Sequence[tuple[int, Tensor]]) -> bool:
    """Whether indices, each with its dimension, are one, or numbers for dimensions in a row: else
    the dimensions that they name come first, wherever they stand."""
    if len(found) == 1:
        return True
    numbers = all(index.dtype not in (torch.bool, torch.uint8) for _, index in found)
    return numbers and found[-1][0] - found[0][0] == len(found) - 1

"""Windows: views by strides that code gives, as of parts of a sequence that overlap."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.run.calls import Call, rule

#: So many elements of a tensor are looked at one by one.
_MOST = 2**22


@rule("as_strided")
def by_strides(call: Call) -> Labels:
    """Which place of a dimension each element of the view is from, is seen element by element."""
    source: Tensor = call.args["self"]
    old = call.of(source)
    result = Labels.fixed(call.out.shape)
    result.memory = old.memory
    memory = source.untyped_storage().nbytes() // source.element_size()
    for dim, vector in enumerate(old.dims):
        if vector is None or not vector.any():
            continue
        found = None
        if memory <= _MOST and source.size(dim) > 1:
            found = _along_one(_seen(call, source, dim, memory))
        if found is None or result.dims[found[0]] is not None:
            call.refuse(vector, "is looked at through windows")
            continue
        place, part = found
        if part.stop - part.start < vector.size or part.step > 1:
            call.refuse(vector, "is looked at through windows")
            continue
        result.dims[place], result.zero[place] = vector[part], old.zero[dim]
    return result


def _seen(call: Call, source: Tensor, dim: int, memory: int) -> Vector:
    """For each element of the view its place along a dimension of the source."""
    places = torch.full((memory,), -1)
    spread = places.as_strided(source.shape, source.stride(), source.storage_offset())
    shape = [-1 if other == dim else 1 for other in range(source.dim())]
    spread.copy_(torch.arange(source.size(dim)).view(shape).expand(source.shape))
    out = call.out
    return places.as_strided(out.shape, out.stride(), out.storage_offset()).numpy()


def _along_one(seen: Vector) -> tuple[int, slice] | None:
    """The one dimension that places depend on, and the places along it; None if there is none such,
    or the view sees what is not the source's."""
    on = [
        dim
        for dim in range(seen.ndim)
        if seen.shape[dim] > 1 and (seen != seen.take([0], axis=dim)).any()
    ]
    if len(on) != 1 or (seen < 0).any():
        return None
    line = seen[tuple(slice(None) if dim == on[0] else 0 for dim in range(seen.ndim))]
    step = int(line[1] - line[0])
    if step < 1 or (np.diff(line) != step).any():
        return None
    return on[0], slice(int(line[0]), int(line[-1]) + 1, step)

"""Layers that take statistics of their own weights over their input channels.

What a layer with a standardised weight multiplies by is computed of the whole weight, so a column
at zero counts in it. Without a channel its statistics are of the columns that are kept: the layer
is run on these, as a norm across channels is (across.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.labels import has_atoms

if TYPE_CHECKING:
    from taylor_kernels.tracing.notes.entries import Table
    from taylor_kernels.tracing.notes.record import Record
    from taylor_kernels.tracing.run.recorder import Recorder

#: Names of a layer's weights, and along which of its dimensions each has the channels.
Weights = tuple[tuple[str, int], ...]
#: The fields of an `Across` from `vectors` to `cells`.
Found = tuple[
    tuple[Vector, ...], tuple[Vector, ...], bool, bool, Weights, tuple[Vector, ...]
]  # fmt: skip


def of_weights(
    recorder: Recorder, module: nn.Module, name: str, given: Tensor, output: Tensor, dim: int
) -> Found | None:
    """What a module's call is if its own weights are multiplied with these channels.

    Of grouped convolutions each group has inputs of its own, so that no dimension of the weight is
    all of them.

    Args:
        name: the module's.
        dim: the channels' dimension in what the module was given.
    """
    labels, record = recorder.labels, recorder.record
    channels = labels(given).dims[dim]
    products = [p for p in record.products if p.caller == p.module == name]
    if channels is None or channels.size < 2 or not has_atoms(channels):
        return None
    if not products or any(product.groups is not None for product in products):
        return None
    if module._modules or any(buffer is not None for buffer in module._buffers.values()):
        return None
    inputs, tables = _inputs(record, name, products[-1].inputs)
    vectors, beside = [channels], [*labels(output).dims]
    weights: list[tuple[str, int]] = []
    for key, tensor in module.named_parameters(recurse=False):
        for place, vector in enumerate(labels(tensor).dims):
            if vector is not None and any(np.array_equal(vector, one) for one in inputs):
                vectors.append(vector)
                weights.append((key, place))
            else:
                beside.append(vector)
    if not weights or any(vector.size != channels.size for vector in vectors):
        return None
    return (
        tuple(vector.copy() for vector in vectors),
        tuple(vector.copy() for vector in beside if vector is not None),
        False,
        True,
        tuple(weights),
        tuple(table.cells for table in tables),
    )


def _inputs(record: Record, name: str, inputs: Vector) -> tuple[list[Vector], list[Table]]:
    """What a layer reads, as its product and as its weight has it before code has made it and the
    places of a kernel one dimension and cut that again; and the tables of that.

    Args:
        name: the layer's.
        inputs: as its product has them.
    """
    mine = [table for table in record.tables if table.where[0] == name]
    again = [t for t in mine if any(np.array_equal(axis, inputs) for axis in t.axes)]
    found = [inputs]
    for table in again:
        place = [np.array_equal(axis, inputs) for axis in table.axes].index(True)
        same = [t for t in mine if np.array_equal(t.cells, table.cells)]
        found += [t.axes[place] for t in same if len(t.axes) == len(table.axes)]
    return found, again

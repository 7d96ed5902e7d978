"""Norms across channels: modules whose statistics are of all channels, as LayerNorm and RMSNorm.

A channel at zero still counts in such a statistic, so masking it is not removing it. What removal
means is a definition: the statistics are of the channels that are kept. It can be followed where
the module does nothing else to channels than this, whatever its class: it is given one tensor and
returns one of the same shape, it has parameters, which lie along the channels and along nothing
else, and all that mixes channels while it runs are means, norms and the like of these. Run on the
channels that are kept, with its parameters cut to them, it then computes what it will compute once
the others are removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from taylor_kernels.tracing.labels import has_atoms
from taylor_kernels.tracing.record import Reason, Vector

if TYPE_CHECKING:
    from taylor_kernels.tracing.frames import Frame
    from taylor_kernels.tracing.recorder import Recorder

#: Kinds of mixers that take a statistic of all channels (`Reason.mixer`).
STATISTICS = {
    "mean", "var", "std", "var_mean", "std_mean", "sum", "norm", "linalg_vector_norm",
    "native_layer_norm", "layer_norm", "rms_norm", "fused_rms_norm", "native_group_norm",
    "group_norm",
}  # fmt: skip


@dataclass(frozen=True)
class Across:
    """A call of a module that mixes the channels of one dimension and does nothing else to them.

    Attributes:
        module: its name.
        dim: the channels' dimension in its input and output, from the end.
        vectors: the channels in the input, in the output, and along each parameter.
        fixed: where the record's `fixed` begins and ends to speak of this call.
    """

    module: str
    dim: int
    vectors: tuple[Vector, ...]
    fixed: range


class AcrossNorms:
    """Writes those modules of a run that may be norms across channels down."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def leave(self, frame: Frame, kwargs: Mapping[str, Any], output: Any) -> None:
        """A module has run."""
        module = frame.module
        if kwargs or module is None or not frame.name or not frame.leaf or len(frame.given) != 1:
            return
        record, given = self._recorder.record, frame.given[0]
        span = range(frame.first, len(record.fixed))
        if not any(record.fixed[n][1].mixer and has_atoms(record.fixed[n][0]) for n in span):
            return
        if not isinstance(output, Tensor) or output.shape != given.shape:
            return
        for dim in range(-output.dim(), 0):
            vectors = self._along(module, given, output, dim)
            if vectors and _mixes(record.fixed, span, vectors):
                record.across.append(Across(frame.name, dim, vectors, span))

    def _along(
        self, module: nn.Module, given: Tensor, output: Tensor, dim: int
    ) -> tuple[Vector, ...]:
        """The channels along this dimension of all the module's tensors, if all have some."""
        size, labels = output.size(dim), self._recorder.labels
        found = [labels(given).dims[dim], labels(output).dims[dim]]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            dims = [d for d, extent in enumerate(tensor.shape) if extent == size]
            if tensor.numel() != size or not dims:
                return ()
            found.append(labels(tensor).dims[dims[0]])
        vectors = tuple(vector.copy() for vector in found if vector is not None)
        return vectors if 2 < len(vectors) == len(found) and size > 1 else ()


def _mixes(fixed: Sequence[tuple[Vector, Reason]], span: range, vectors: Sequence[Vector]) -> bool:
    """Whether something that happened mixes one of these vectors."""
    return any(
        fixed[n][1].mixer and any(np.array_equal(fixed[n][0], vector) for vector in vectors)
        for n in span
    )


def accepted(
    across: Sequence[Across], fixed: Sequence[tuple[Vector, Reason]], label: Vector
) -> list[Across]:
    """The calls of modules of which every call does what this module's docstring asks.

    Args:
        label: atom -> class.
    """
    calls: dict[str, list[Across]] = {}
    for call in across:
        calls.setdefault(call.module, []).append(call)
    mixers: dict[str, set[int]] = {}
    for number, (vector, reason) in enumerate(fixed):
        if reason.mixer and vector.any():
            mixers.setdefault(reason.module, set()).add(number)
    found = []
    for module, offered in calls.items():
        # A stream as long as it is wide offers both dimensions: only one is the weight's.
        mine = [call for call in offered if _is_one(call, fixed, label)]
        covered = {n for call in mine for n in call.fixed}
        if mine and mixers[module] <= covered and len({call.dim for call in mine}) == 1:
            found += mine
    return found


def _is_one(call: Across, fixed: Sequence[tuple[Vector, Reason]], label: Vector) -> bool:
    first = label[call.vectors[0]]
    if not all(np.array_equal(label[other], first) for other in call.vectors[1:]):
        return False
    mixed = [fixed[n] for n in call.fixed if fixed[n][1].mixer and fixed[n][0].any()]
    return all(
        reason.mixer in STATISTICS and np.isin(label[vector[vector != 0]], first).all()
        for vector, reason in mixed
    )

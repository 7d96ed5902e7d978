"""Norms across channels: modules whose statistics are of all channels, as LayerNorm and RMSNorm.

A channel at zero still counts in such a statistic, so masking it is not removing it. What removal
means is a definition: the statistics are of the channels that are kept. It can be followed where
the module does nothing else to channels than this, whatever its class, as a norm or CBAM's spatial
attention: it is given one tensor, returns one that has the same channels or none of them, and all
that mixes them while it runs are means, maxima, norms and the like, in its own code. Run on the
channels that are kept, it then computes what it will compute once the others are removed.

Parameters of its own may lie along the channels and are cut to them, and attributes may count them.
The module then runs a second time, so that the modules in it have no state. Without such it may
hold modules with any parameters, and runs once, on what is left of its input.

A layer that standardises its weight over its input channels is one too: what it multiplies by is
computed of the whole weight. Its weight is cut along them, and what it returns has none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from taylor_kernels.tracing.notes.atoms import Reason, Vector
from taylor_kernels.tracing.notes.attributes import rules_of
from taylor_kernels.tracing.notes.labels import has_atoms
from taylor_kernels.tracing.notes.own_weights import Found, Weights, of_weights

if TYPE_CHECKING:
    from taylor_kernels.tracing.run.frames import Frame
    from taylor_kernels.tracing.run.recorder import Recorder

#: Kinds of mixers that take a statistic of all channels (`Reason.mixer`).
STATISTICS = {
    "mean", "var", "std", "var_mean", "std_mean", "sum", "norm", "linalg_vector_norm",
    "native_layer_norm", "layer_norm", "rms_norm", "fused_rms_norm", "native_group_norm",
    "group_norm", "max", "min", "amax", "amin", "aminmax", "logsumexp", "batch_norm",
    "native_batch_norm", "native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm",
}  # fmt: skip


@dataclass(frozen=True)
class Across:
    """A call of a module that mixes the channels of one dimension and does nothing else to them.

    Attributes:
        module: its name.
        dim: the channels' dimension in its input, and in its output if that has it, from the end.
        rank: dimensions of the input.
        vectors: the channels in the input, in the output if that has them, and along parameters.
        beside: along all other dimensions and tensors of the module, which have none of them.
        returned: whether the output has them.
        cut: whether the module has parameters or buffers, which lie along them.
        weights: of a layer, the names of those of its parameters that have the channels along one
            of several dimensions, and which that is; all others have none of them.
        fixed: where the record's `fixed` begins and ends to speak of this call.
    """

    module: str
    dim: int
    rank: int
    vectors: tuple[Vector, ...]
    beside: tuple[Vector, ...]
    returned: bool
    cut: bool
    weights: Weights
    cells: tuple[Vector, ...]
    fixed: range


class Kept(NamedTuple):
    """What a norm across channels is run on while some of them are masked.

    Attributes:
        dim: the channels' dimension in its input, from the end.
        places: [n] int64, those that stay.
        width: how many there are, with those that are masked.
        rank: dimensions of its input.
        returned: whether its output has them too, along the same dimension.
        cut: whether its own parameters and buffers lie along them.
        weights: as of `Across`.
        counting: of a layer, names of its attributes that count these channels, and not its others.
    """

    dim: int
    places: Tensor
    width: int
    rank: int
    returned: bool
    cut: bool
    weights: Weights = ()
    counting: tuple[str, ...] = ()


class AcrossNorms:
    """Writes those modules of a run that may be norms across channels down."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._others: set[str] = set()  # modules of which a call is none

    def leave(self, frame: Frame, kwargs: Mapping[str, Any], output: Any) -> None:
        """A module has run."""
        name, module = frame.name, frame.module
        if name in self._others:
            return
        record = self._recorder.record
        offered: list[Across] = []
        given = [] if frame.mixed else [*frame.given, *kwargs.values()]
        if module is not None and name and len(given) == 1 and isinstance(given[0], Tensor):
            if isinstance(output, Tensor):
                self._recorder.labels(output)  # what it is the mean of is said in this call
            offered = self._offered(module, name, given[0], output, frame.first)
        if offered:
            record.across += offered
        else:
            self._others.add(name)
            if any(call.module == name for call in record.across):
                record.across[:] = [call for call in record.across if call.module != name]

    def _offered(
        self, module: nn.Module, name: str, given: Tensor, output: Any, first: int
    ) -> list[Across]:
        """This call by each dimension that may be the channels'."""
        fixed = self._recorder.record.fixed
        span = range(first, len(fixed))
        reasons = ((reason, vector) for vector, reason in fixed[first:])
        if not any(r.mixer and r.module == name and has_atoms(vector) for r, vector in reasons):
            return []
        if not isinstance(output, Tensor):
            return []
        offered = []
        for dim in range(-given.dim(), 0):
            found = self._along(module, name, given, output, dim)
            if not found or not _mixes(fixed, span, found[0]):
                found = of_weights(self._recorder, module, name, given, output, dim)
            if found and _mixes(fixed, span, (*found[0], *found[-1])):
                offered.append(Across(name, dim, given.dim(), *found, span))
        return offered

    def _along(
        self, module: nn.Module, name: str, given: Tensor, output: Tensor, dim: int
    ) -> Found | None:
        """The first fields of this call if this is the channels' dimension; None if not."""
        size, labels = given.size(dim), self._recorder.labels
        channels, results = labels(given).dims[dim], list(labels(output).dims)
        if size < 2 or channels is None or not has_atoms(channels):
            return None
        vectors: list[Vector | None] = [channels]
        beside: list[Vector | None] = []
        returned = output.shape == given.shape and results[dim] is not None
        if returned:
            vectors.append(results.pop(dim))
        beside += results
        own = [
            t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None
        ]
        for tensor in own:
            dims = [d for d, extent in enumerate(tensor.shape) if extent == size]
            if tensor.numel() == size and dims:
                vectors.append(labels(tensor).dims[dims[0]])
            else:
                beside += labels(tensor).dims
        along = len(vectors) > 1 + returned
        if along and len(vectors) < 1 + returned + len(own):
            return None  # which of its tensors are to be cut is told by their size
        inside = [
            tensor
            for child in module.children()
            for tensor in (*child.parameters(), *child.buffers())
        ]
        for tensor in inside:
            beside += labels(tensor).dims
        sizes = self._recorder.record.sizes
        counts = along or bool(rules_of(module)) or any(size.module == name for size in sizes)
        if (inside and counts) or any(vector is None for vector in vectors):
            return None
        return (
            tuple(vector.copy() for vector in vectors if vector is not None),
            tuple(vector.copy() for vector in beside if vector is not None),
            returned,
            along,
            (),
            (),
        )


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
        same = {(call.dim, call.returned, label[call.vectors[0]].tobytes()) for call in mine}
        if mine and mixers[module] <= covered and len(same) == 1:
            found += mine
    return found


def _is_one(call: Across, fixed: Sequence[tuple[Vector, Reason]], label: Vector) -> bool:
    first = label[call.vectors[0]]
    if not all(np.array_equal(label[other], first) for other in call.vectors[1:]):
        return False
    mine = _marked(first[first != 0], label)
    if any(mine[label[other]].any() for other in call.beside):
        return False
    mine[0] = not first.all()
    for cells in call.cells:
        mine[label[cells]] = True
    return all(
        fixed[n][1].mixer in STATISTICS
        and fixed[n][1].module == call.module
        and mine[label[fixed[n][0][fixed[n][0] != 0]]].all()
        for n in mixing(call, fixed, label)
    )


def mixing(call: Across, fixed: Sequence[tuple[Vector, Reason]], label: Vector) -> Iterator[int]:
    """The places in `fixed` that say that the channels of this call are mixed."""
    channels = np.concatenate([label[vector] for vector in (call.vectors[0], *call.cells)])
    mine = _marked(channels[channels != 0], label)
    for number in call.fixed:
        vector, reason = fixed[number]
        if reason.mixer and mine[label[vector]].any():
            yield number


def _marked(classes: Vector, label: Vector) -> npt.NDArray[np.bool_]:
    """[atoms] bool: these classes, in which vectors are looked up sooner than by `np.isin`."""
    found = np.zeros(label.size, bool)
    found[classes] = True
    return found

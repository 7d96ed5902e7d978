"""What comes of an operation that has run: its rule is asked, and the results get their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.run.calls import OTHER, RULES, Call

if TYPE_CHECKING:
    from taylor_kernels.tracing.run.recorder import Recorder


def apply(recorder: Recorder, call: Call, written: Sequence[Tensor]) -> None:
    """Label what an operation has made.

    Args:
        written: the tensors among its arguments that it has written into.
    """
    outs = call.outs
    products, norms = len(recorder.record.products), len(recorder.record.norms)
    try:
        result = RULES.get(call.name, RULES[OTHER])(call)
    except MemoryError:
        raise
    except Exception as error:
        # Arguments that the rule does not foresee: what it cannot follow cannot go.
        recorder.record.failures.append(f"{call.name} in {recorder.module!r}: {error!r}")
        call.refuse_all("goes through an operation that is not known in this form")
        result = None
    labels = result if isinstance(result, list) else [result]
    if len(labels) < len(outs):
        labels += [None] * (len(outs) - len(labels))
    for tensor, new in zip(outs, labels, strict=False):
        new = new or Labels.fixed(tensor.shape)
        if written and any(tensor is other for other in written) and not call.operation.moves:
            _write(recorder, call, tensor, new)
        else:
            new.shape = tuple(tensor.shape)
            recorder.store.set(tensor, new)
    if not outs and written:
        for tensor, new in zip(written, labels, strict=False):
            _write(recorder, call, tensor, new or Labels.fixed(tensor.shape))
    found = recorder.record.products[products:], recorder.record.norms[norms:]
    recorder.flow.follow(call, outs or written, *found)


def _write(recorder: Recorder, call: Call, tensor: Tensor, new: Labels) -> None:
    """Labels of values that were written into a tensor, seen by all its views."""
    old = call.labels.get(id(tensor))
    if old is None or old.shape != tuple(tensor.shape):
        new.shape = tuple(tensor.shape)
        recorder.store.set(tensor, new)
        return
    if old.uniform or old.memory.repeated:
        part = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
        other = (old.uniform and not new.is_uniform) or not old.loose <= new.repeated
        old.memory.uneven |= part or other
    for dim, vector in enumerate(new.dims):
        mine = old.dims[dim]
        if vector is mine:
            pass
        elif mine is not None and old.uniform:
            if vector is not None:
                blank = mine == 0
                call.join(mine[~blank], vector[~blank])
                mine[blank] = vector[blank]
        else:
            call.join(mine, vector)
    old.uniform = old.uniform and new.uniform
    if not all(
        new.is_zero(dim) or vector is None or not vector.any()
        for dim, vector in enumerate(old.dims)
    ):
        old.memory.spoiled = True

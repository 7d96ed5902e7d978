"""What runs in train mode say about channels beside one in eval mode.

Some parameters and buffers are read while a model is trained and at no other time: what masked time
steps are set to (wav2vec 2.0), the layers of auxiliary heads, a running centre. They lie on
channels of the network, and have to lose their entries with them. Further runs show how; layers,
norms and what is scored stay those of eval mode. What may be read on another day, but was not in
any of these runs, may lie on any channels of its width: those stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields, replace

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from taylor_kernels.tracing.chance import Draws
from taylor_kernels.tracing.labels import Labels
from taylor_kernels.tracing.record import Reason, Record
from taylor_kernels.tracing.recorder import Execute, Recorder
from taylor_kernels.tracing.running import tensors_of_modules

#: Fields of a record that stay those of the run in eval mode.
OF_EVAL_MODE = frozenset(
    {"norms", "products", "steps", "mixtures", "ran", "values", "step", "unread"}
)


def set_training(model: nn.Module) -> None:
    """Put a model into train mode, but for norms whose statistics need more than one example."""
    model.train()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.training = False


def lasting(modules: Mapping[str, nn.Module]) -> dict[str, bool]:
    """The parameters of a model and the buffers that its checkpoints hold, which what training has
    learnt is in; whether they are parameters."""
    parameters, buffers = tensors_of_modules(modules)
    passing = {
        f"{prefix}.{leaf}" if prefix else leaf
        for prefix, module in modules.items()
        for leaf in getattr(module, "_non_persistent_buffers_set", ())
    }
    return {name: name in parameters for name in (*parameters, *buffers) if name not in passing}


def find_unread(record: Record, lasting: Mapping[str, bool]) -> list[str]:
    """Those of these tensors that the runs have computed without and that may lie along channels:
    of buffers, which are often tables of positions, those that are as wide as some tensor that was
    read.

    Args:
        lasting: tensor -> whether it is a parameter.
    """
    seen = set(record.seen)
    for table in reversed(record.tables):  # a later one may cut what an earlier one has made
        if table.cells.size and table.cells.item(0) in seen:
            seen.update(axis.item(0) for axis in table.axes if axis.size)
    read = {name for start, name, _, _ in record.starts if start in seen}
    wide = {size for _, name, _, size in record.starts if name in read}
    found = dict.fromkeys(
        name
        for _, name, _, size in record.starts
        if name in lasting and name not in read and size > 1 and (lasting[name] or size in wide)
    )
    return list(found)


def learn_from_training(
    recorder: Recorder,
    tensors: Iterable[tuple[str, Tensor]],
    run: Callable[[Recorder], Iterable[Tensor]],
    new_recorder: Callable[[Execute], Recorder],
    lasting: Mapping[str, bool],
) -> None:
    """Add to a record which channels go together in train mode, as far as the model runs there.

    Args:
        recorder: of a run in eval mode.
        tensors: the parameters and buffers that it follows, by name.
        run: runs the model in train mode on the example inputs under a recorder, leaves it as it
            was, and gives what it returns.
        new_recorder: makes one like `recorder` that runs operations so.
        lasting: as of `find_unread`.
    """
    why = ""
    for highest in (False, True):
        draws = Draws(highest=highest)
        try:
            _learn(recorder, tensors, run, new_recorder(draws))
        except Exception as error:  # it needs targets, say, or takes too long
            why = f"and it does not run in train mode ({_short(error)})"
        finally:
            draws.close()
        unread = find_unread(recorder.record, lasting)
        if draws.asked:
            why = why or "and a run that chance leads another way may read it"
        if not unread or not draws.drew:
            break
    if why and unread:
        keep_as_wide(recorder.record, unread, why)


def _learn(
    recorder: Recorder,
    tensors: Iterable[tuple[str, Tensor]],
    run: Callable[[Recorder], Iterable[Tensor]],
    other: Recorder,
) -> None:
    record = recorder.record
    # Numbers of atoms, and of what is fixed, go on from those of the runs before.
    heard = other.record = Record(
        **{
            field.name: copy.copy(getattr(record, field.name))
            for field in fields(record)
            if field.name not in OF_EVAL_MODE
        }
    )
    places = {(name, dim): (start, size) for start, name, dim, size in record.starts}
    for name, tensor in tensors:
        spans = [places[name, dim] for dim in range(tensor.dim()) if (name, dim) in places]
        if len(spans) == tensor.dim():
            dims = [np.arange(start, start + size) for start, size in spans]
            known = Labels(tuple(tensor.shape), list(dims), [True] * tensor.dim(), name=name)
            other.store.set(tensor, known)
    reason = Reason("reaches the output of the model in train mode")
    for tensor in run(other):
        for vector in other.labels(tensor).vectors():
            heard.fix(vector, reason)
    recorder.record = replace(heard, **{name: getattr(record, name) for name in OF_EVAL_MODE})


def keep_as_wide(record: Record, unread: Collection[str], why: str) -> None:
    """Channels along which one of these tensors may lie stay: all those of its widths."""
    for name in unread:
        reason = Reason(f"is as wide as {name!r}, which no run has read, {why}")
        sizes = {size for _, own, _, size in record.starts if own == name and size > 1}
        for start, own, _, size in list(record.starts):
            if size in sizes and own not in unread:
                record.fix(np.arange(start, start + size), reason)
        for join in record.joins:
            if join.one.size in sizes and join.one.any():
                record.fix(join.one, reason)


def _short(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 120 else text[:117] + "..."

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
from functools import cache, partial
from inspect import unwrap
from types import FunctionType

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from taylor_kernels.tracing.model.caches import plain_tensors
from taylor_kernels.tracing.model.perhaps_read import perhaps_read
from taylor_kernels.tracing.notes.atoms import Reason
from taylor_kernels.tracing.notes.experts import is_router
from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.notes.record import Record
from taylor_kernels.tracing.run.chance import Draws
from taylor_kernels.tracing.run.recorder import Recorder
from taylor_kernels.tracing.run.refusals import said
from taylor_kernels.tracing.run.running import tensors_of_modules

#: Fields of a record that stay those of the run in eval mode.
OF_EVAL_MODE = frozenset(
    {"norms", "products", "steps", "mixtures", "ran", "values", "step", "unread"}
)


#: Operations that give values another place or type, and no other shape but for sizes of one.
_SAME = {
    "to", "_to_copy", "copy", "contiguous", "clone", "alias", "detach", "squeeze", "unsqueeze",
}  # fmt: skip
#: Dropping a branch of some examples draws numbers, makes a mask of them and multiplies with it.
_DRAWS_OF_BRANCHES = ("rand", "bernoulli")
_OF_BRANCHES = {
    *_DRAWS_OF_BRANCHES, "empty", "new_empty", "add", "floor", "div", "mul", "native_dropout",
}  # fmt: skip

#: Runs the model under a recorder and gives what it returns.
Run = Callable[[Recorder], Iterable[Tensor]]


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
        for leaf in (*getattr(module, "_non_persistent_buffers_set", ()), *plain_tensors(module))
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


def asks_for_mode(modules: Iterable[nn.Module]) -> bool:
    """Whether code outside of PyTorch's own modules asks if they train."""
    classes: set[type] = {type(module) for module in modules}
    return any(_class_asks_for_mode(each) for each in classes)


@cache
def _class_asks_for_mode(module_class: type) -> bool:
    return any(
        isinstance(method, FunctionType) and "training" in unwrap(method).__code__.co_names
        for parent in module_class.__mro__
        if not parent.__module__.startswith("torch.nn.")
        for method in vars(parent).values()
    )


def learn_from_training(
    recorder: Recorder,
    modules: Mapping[str, nn.Module],
    run: Run,
    new_recorder: Callable[..., Recorder],
) -> None:
    """Add to a record which channels go together in train mode, if that may be others.

    Args:
        recorder: of a run in eval mode.
        modules: dict(model.named_modules()).
        run: runs the model in train mode on the example inputs under a recorder, leaves it as it
            was, and gives what it returns.
        new_recorder: makes one like `recorder`, with options of its class.
    """
    record, states = recorder.record, lasting(modules)
    record.unread = find_unread(record, states)
    if any(map(is_router, modules.values())):  # what it mixes is taken back once, for one run
        why = "and models with routers are traced in eval mode only"
        keep_as_wide(record, perhaps_read(record.unread, modules), why)
    elif record.unread or (
        asks_for_mode(modules.values()) and _runs_otherwise(recorder, run, new_recorder)
    ):
        _learn_from_both_ends(recorder, modules, states, run, new_recorder)
        recorder.record.trained = True


def _runs_otherwise(recorder: Recorder, run: Run, new_recorder: Callable[..., Recorder]) -> bool:
    """Whether train mode runs or returns what the run in eval mode has not."""
    hollow = recorder.hollow is not None
    other = new_recorder(Draws(highest=False), blind=True, hollow=hollow)
    try:
        run(other)
    except Exception:  # other code asks for values, or it does not run
        return True
    if other.hollow is not None and (other.hollow.asked or other.hollow.kept):
        return True  # it has gone on without values, or has kept what gets them in a run as it is
    more = other.kinds - recorder.kinds
    drawn = sum(more[name] for name in _DRAWS_OF_BRANCHES)
    return any(
        number > (drawn if name in _OF_BRANCHES else 0)
        for name, number in more.items()
        if name not in _SAME
    )


def _learn_from_both_ends(
    recorder: Recorder,
    modules: Mapping[str, nn.Module],
    states: Mapping[str, bool],
    run: Run,
    new_recorder: Callable[..., Recorder],
) -> None:
    """Learn from a run in which what is done by chance is done, and from one in which it is not
    if something is still unread; what is unread then, or could not be learnt, keeps channels."""
    parameters, buffers = tensors_of_modules(modules)
    why = ""
    asked: set[str] = set()
    for highest in (False, True):
        draws = Draws(highest=highest)
        other = new_recorder(draws)
        draws.module = partial(getattr, other, "module")
        other.draws = draws
        try:
            _learn(recorder, parameters | buffers, run, other)
        except Exception as error:  # it needs targets, say, or takes too long
            why = f"and it does not run in train mode ({_short(error)})"
        finally:
            draws.cross()
        unread = find_unread(recorder.record, states)
        asked |= draws.asked | recorder.record.asked
        if not unread or not draws.drew:
            break
    if why:
        asked = {""}  # what it does further on is not known
    why = why or "and one that other values, or chance, lead another way may read it"
    keep_as_wide(recorder.record, perhaps_read(unread, modules, asked), why)


def _learn(recorder: Recorder, tensors: Mapping[str, Tensor], run: Run, other: Recorder) -> None:
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
    for name, tensor in tensors.items():
        spans = [places[name, dim] for dim in range(tensor.dim()) if (name, dim) in places]
        if len(spans) == tensor.dim():
            dims = [np.arange(start, start + size) for start, size in spans]
            zero = record.zeros(name, tensor.dim())
            known = Labels(tuple(tensor.shape), list(dims), zero, name=name)
            other.store.set(tensor, known)
    reason = Reason("reaches the output of the model in train mode")
    for tensor in run(other):
        for vector in other.labels(tensor).vectors():
            heard.fix(vector, reason)
    recorder.record = replace(heard, **{name: getattr(record, name) for name in OF_EVAL_MODE})


def keep_as_wide(record: Record, unread: Collection[str], why: str) -> None:
    """Channels along which one of these tensors may lie stay: all those of its widths."""
    for name in unread:
        reason = Reason(
            f"is as wide as {name!r}, which no run has read, {why}; pass an example that reaches "
            "it, or take it off the model if nothing will"
        )
        sizes = {size for _, own, _, size in record.starts if own == name and size > 1}
        for start, own, _, size in list(record.starts):
            if size in sizes and own not in unread:
                record.fix(np.arange(start, start + size), reason)
        for join in record.joins:
            if join.one.size in sizes and join.one.any():
                record.fix(join.one, reason)


def _short(error: Exception) -> str:
    text = said(error)
    return text if len(text) <= 120 else text[:117] + "..."

"""What a run in train mode says about channels beside one in eval mode.

Some parameters are read while a model is trained and at no other time: what masked time steps are
set to (wav2vec 2.0), the layers of auxiliary heads. They lie on channels of the network, and have
to lose their entries with them. A second run shows how; layers, norms and what is scored stay those
of eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from taylor_kernels.tracing.labels import Labels
from taylor_kernels.tracing.record import Reason, Record
from taylor_kernels.tracing.recorder import Recorder


def some_unread(record: Record, parameters: Iterable[str]) -> bool:
    """Whether the run has computed without one of these parameters."""
    names = set(parameters)
    return any(
        dim == 0 and name in names and start not in record.seen
        for start, name, dim, _ in record.starts
    )


def learn_from_training(
    recorder: Recorder,
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    run: Callable[[Recorder], Iterable[Tensor]],
    new_recorder: Callable[[], Recorder],
) -> None:
    """Add to a record which channels go together in train mode, if the model runs there.

    Args:
        recorder: of a run in eval mode.
        tensors: the parameters and buffers that it follows, by name.
        run: runs the model on the example inputs under a recorder and gives what it returns.
        new_recorder: makes one like `recorder`.
    """
    record, other = recorder.record, new_recorder()
    # Numbers of atoms, and of what is fixed, go on from those of the first run.
    heard = other.record = Record(
        count=record.count, starts=record.starts, fixed=list(record.fixed), size=record.size
    )
    places = {(name, dim): (start, size) for start, name, dim, size in record.starts}
    for name, tensor in tensors:
        spans = [places[name, dim] for dim in range(tensor.dim()) if (name, dim) in places]
        if len(spans) == tensor.dim():
            dims = [np.arange(start, start + size) for start, size in spans]
            known = Labels(tuple(tensor.shape), list(dims), [True] * tensor.dim(), name=name)
            other.store.set(tensor, known)
    model.train()
    try:
        outputs = run(other)
    except (TimeoutError, MemoryError):
        raise
    except Exception:  # it needs targets, or more than one example: the proof has to do without
        return
    finally:
        model.eval()
    reason = Reason("reaches the output of the model in train mode")
    for tensor in outputs:
        for vector in other.labels(tensor).vectors():
            heard.fix(vector, reason)
    recorder.record = replace(
        record,
        count=heard.count, size=heard.size, fixed=heard.fixed,
        joins=record.joins + heard.joins, across=record.across + heard.across,
        tables=record.tables + heard.tables, cuts=record.cuts + heard.cuts,
        sizes=record.sizes + heard.sizes, echoes=record.echoes + heard.echoes,
        heads=record.heads + heard.heads,
    )  # fmt: skip

"""Calls that go straight to the native kernels, past PyTorch's dispatcher.

Checking and describing a list of tensors in Python takes longer than its sums do, so the native
module reads them itself, and on the CPU makes the outputs and runs the kernels (csrc/bindings).
For a GPU it makes a plan of the call. It does so for plain dense tensors in an order that the
kernels know, where nothing else wants to see the call: no tracer, mode, transform or profiler. For
any other call each function here returns None, and the op that torch.library knows is called, which
checks, copies and says what is wrong. A plan is made for its call alone and is not kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from taylor_kernels.backends import native, runs_natively

_KINDS = {False: torch.float32, True: torch.float64}
_CPU = torch.device("cpu")
_ALL = 2**32 - 1

# Whether something in this thread wants to see the calls of PyTorch's ops: modes, transforms,
# tracers and profilers. Looked up once, since a call asks them all.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._is_torch_function_mode_enabled
_transforms = torch._C._functorch.peek_interpreter_stack
_tracer = torch._C._get_tracing_state
_profiler = torch._C._autograd._profiler_enabled


def caller() -> Any:
    """The native module, if it may make this call, else None."""
    if (
        torch.compiler.is_compiling()
        or not native.plans_calls
        or _dispatch_modes()
        or _function_modes()
        or _transforms() is not None
        or _tracer() is not None
        or _profiler()
    ):
        return None
    return native._native


def cpu_threads(backend: str | None) -> int:
    """On how many threads a call of CPU tensors is to run natively; 0 if another backend is named.

    No backend is before the native kernels where the call names none (backends/__init__.py).
    """
    return torch.get_num_threads() if backend is None or backend == "cpu" else 0


def packed_tables(
    op: str,
    sums: tuple[int, ...],
    weights: object,
    others: Mapping[str, object],
    groups: object,
    axes: Sequence[int],
    draw: tuple[int, Sequence[int] | None] | None,
    chosen: int | None,
    backend: str | None,
    whole: bool,
) -> tuple[list[Tensor], list[list[Tensor]] | None] | None:
    """For each axis its packed table [filters, *sums]; and, unless these are to stay whole, the
    tables of the parameters, which are its parts.

    `others` are what belongs to the weights, by name. `draw` is the seed of an op that draws signs,
    and the tensors' streams. `chosen` are the sums that are wanted, a bit each, if not all.
    """
    native_module = caller()
    if native_module is None:
        return None
    for each in others.values():
        if each is None:
            return None
    seed, streams = (0, None) if draw is None else draw
    if streams is not None and not isinstance(streams, (list, tuple)):
        return None
    called = getattr(native_module, "call_" + op)(
        weights,
        others.get("grads"),
        others.get("hvps"),
        groups,
        streams,
        0 in axes,
        1 in axes,
        sums[0] if sums else 0,
        seed,
        _ALL if chosen is None else chosen,
        cpu_threads(backend),
        whole,
    )
    if called is None or len(called) == 2:  # it ran, on the CPU
        return called
    plan, on_gpu, index, wide, filters = called
    device, dtype = _place(on_gpu, index), _KINDS[wide]
    first = weights if isinstance(weights, Tensor) else weights[0]  # type: ignore[index]
    if not runs_natively(op, device, first.dtype, backend):
        return None
    found: list[Any] = [None, None]
    for axis in axes:
        found[axis] = torch.empty((filters[axis], *sums), dtype=dtype, device=device)
    plan.set_tables(*found, dtype.itemsize * math.prod(sums))
    native.launch(op, plan, device, *(() if draw is None else (seed,)))
    tables = [found[axis] for axis in axes]
    if chosen is not None:
        leave_out(tables, chosen)
    if whole:
        return tables, None
    return tables, [plan.split(table, axis) for axis, table in zip(axes, tables, strict=True)]


def leave_out(tables: Sequence[Tensor], chosen: int) -> None:
    """Write NaN into the columns of packed tables that were not chosen.

    The kernels of GPUs compute every sum: memory bounds them. Each fill is a launch there, so
    columns that lie side by side share one.
    """
    for table in tables:
        columns = range(table.size(1))
        for wanted, run in groupby(columns, lambda column: chosen >> column & 1):
            if not wanted:
                first, *rest = run
                table.narrow(1, first, 1 + len(rest)).fill_(math.nan)


def one_output(
    op: str,
    called: Any,
    like: Tensor,
    backend: str | None,
    prepare: Callable[[Any], object] | None = None,
) -> Tensor | None:
    """What came of a native call of an op with one output: that, or None, or a plan for a GPU,
    which is run here; `prepare` is told it before.

    `like` has the dtype of the call, by which its backend is chosen.
    """
    if called is None or isinstance(called, Tensor):
        return called
    plan, on_gpu, index, wide, sizes = called
    device, dtype = _place(on_gpu, index), _KINDS[wide]
    if not runs_natively(op, device, like.dtype, backend):
        return None
    out = torch.empty(sizes, dtype=dtype, device=device)
    plan.set_out(out)
    if prepare is not None:
        prepare(plan)
    native.launch(op, plan, device)
    return out


def _place(on_gpu: bool, index: int) -> torch.device:
    return torch.device("cuda", index) if on_gpu else _CPU

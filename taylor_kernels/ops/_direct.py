"""Calls that go straight to the native kernels, past PyTorch's dispatcher.

Checking and describing a list of tensors in Python takes longer than its sums do, so the native
module reads them itself and makes a plan of the call (csrc/bindings/plans.h). It does so for plain
dense tensors in an order that the kernels know, where nothing else wants to see the call: no
tracer, mode, transform or profiler. For any other call each function here returns None, and the op
that torch.library knows is called, which checks, copies and says what is wrong. A plan is made for
its call alone and holds nothing beyond it.
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


def plans() -> Any:
    """The native module, if it may plan this call, else None."""
    if (
        torch.compiler.is_compiling()
        or not native.plans_calls
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return None
    return native._native


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
) -> tuple[list[Tensor], Callable[[int], list[int]]] | None:
    """For each axis its packed table [filters, *sums]; and what tells, of an axis, how many filters
    each tensor has.

    `others` are what belongs to the weights, by name. `draw` is the seed of an op that draws signs,
    and the tensors' streams. `chosen` are the sums that are wanted, a bit each, if not all.
    """
    planner = plans()
    if planner is None or any(each is None for each in others.values()):
        return None
    held = [_own(each) for each in (weights, others.get("grads"), others.get("hvps"))]
    seed: tuple[int, ...] = () if draw is None else (draw[0],)
    streams = None if draw is None else draw[1]
    if streams is not None and not isinstance(streams, (list, tuple)):
        return None
    groups, streams = _own(groups), _own(streams)
    planned = planner.plan_parameters(*held, groups, streams, 1 in axes)
    if planned is None:
        return None
    plan, on_gpu, index, wide, filters = planned
    device, dtype = _place(on_gpu, index), _KINDS[wide]
    first = held[0][0] if isinstance(held[0], list) else held[0]
    if not runs_natively(op, device, first.dtype, backend):
        return None
    found: list[Any] = [None, None]
    for axis in axes:
        found[axis] = torch.empty((filters[axis], *sums), dtype=dtype, device=device)
    plan.set_tables(*found, dtype.itemsize * math.prod(sums))
    if chosen is None:
        native.launch(op, plan, device, *seed)
    elif on_gpu:
        native.launch(op, plan, device)
        leave_out([found[axis] for axis in axes], chosen)
    else:
        native.launch(op, plan, device, sums=chosen)
    return [found[axis] for axis in axes], plan.filters


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
    planned: Any,
    like: Tensor,
    backend: str | None,
    prepare: Callable[[Any], object] | None = None,
) -> Tensor | None:
    """Run the plan of an op with one output, if there is one; `prepare` is told it on a GPU.

    `like` has the dtype of the call, by which its backend is chosen.
    """
    if planned is None:
        return None
    plan, on_gpu, index, wide, sizes = planned
    device, dtype = _place(on_gpu, index), _KINDS[wide]
    if not runs_natively(op, device, like.dtype, backend):
        return None
    out = torch.empty(sizes, dtype=dtype, device=device)
    plan.set_out(out)
    if on_gpu and prepare is not None:
        prepare(plan)
    native.launch(op, plan, device)
    return out


def _own(value: Any) -> Any:
    """A list of one's own, since another thread may change the caller's while kernels run."""
    return list(value) if isinstance(value, (list, tuple)) else value


def _place(on_gpu: bool, index: int) -> torch.device:
    return torch.device("cuda", index) if on_gpu else _CPU

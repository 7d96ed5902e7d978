"""What the ops over parameters share: tensors or lists of them in, a table of sums per filter out.

`tables` is the public side: it checks what it is given, splits lists by device and float64, and
hands out views of the packed tables. `define_list_op` is the inner side: the op that torch.library
knows, which computes the packed tables. Calls on plain tensors go to the native kernels without it
(_direct.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from taylor_kernels.backends import check_name, kernel, native, runs_natively
from taylor_kernels.layout import ParameterItem, accumulator, parameter_item
from taylor_kernels.ops._checks import check_axes, check_groups, check_streams
from taylor_kernels.ops._direct import leave_out, packed_tables
from taylor_kernels.ops._library import define
from taylor_kernels.ops._list_checks import as_lists, by_kind, check_launch, check_lists

if TYPE_CHECKING:
    from typing_extensions import Required


class ListOp(NamedTuple):
    """An op over lists of tensors, as `define_list_op` registers it."""

    name: str
    sums: tuple[int, ...]
    call: Callable[..., tuple[Tensor, Tensor]]  # the op itself


class Draw(NamedTuple):
    """What an op that draws random signs is told."""

    seed: int
    streams: Sequence[int] | None  # of the tensors, if not their places


class OneAxis(TypedDict, total=False):
    """The keywords of a call that gives one table for a parameter, for type checkers."""

    dim: int
    groups: int | Sequence[int]
    packed: Literal[False]
    backend: str | None


class BothAxes(TypedDict, total=False):
    """Those of a call that gives a pair of tables."""

    dim: Required[tuple[int, int]]
    groups: int | Sequence[int]
    packed: Literal[False]
    backend: str | None


class OnePacked(TypedDict, total=False):
    """Those of a call on a list that gives one table for all of it."""

    packed: Required[Literal[True]]
    dim: int
    groups: int | Sequence[int]
    backend: str | None


class BothPacked(TypedDict, total=False):
    """Those of a call on a list that gives a pair of such tables."""

    packed: Required[Literal[True]]
    dim: Required[tuple[int, int]]
    groups: int | Sequence[int]
    backend: str | None


def tables(
    op: ListOp,
    weights: object,
    *,
    dim: int | tuple[int, int] = 0,
    groups: int | Sequence[int] = 1,
    backend: str | None = None,
    draw: Draw | None = None,
    packed: bool = False,
    sums: int | None = None,
    finish: Callable[[Tensor], object] | None = None,
    **others: object,
) -> Any:
    """A table for a tensor, a list of them for a sequence; a pair of either for dim=(0, 1).

    `packed` leaves the tables of a sequence in one, as the kernels write them. `sums` are those
    that are wanted, a bit each, of an op that lets them be chosen; None for all. `finish` changes a
    packed table in place before it is handed out.
    """
    check_name(backend)
    axes = check_axes(dim)
    if packed is not True and packed is not False:
        raise TypeError(f"packed: expected True or False, got {packed!r}")
    whole = packed or isinstance(weights, Tensor)
    direct = packed_tables(
        op.name, op.sums, weights, others, groups, axes, draw, sums, backend, whole
    )
    found: Sequence[Any]
    if direct is None:
        found = _through_the_dispatcher(
            op, weights, others, groups, axes, draw, sums, backend, finish, whole
        )
    else:
        packed_ones, parts = direct
        if finish is not None:
            for table in packed_ones:
                finish(table)
        found = packed_ones if parts is None else parts
    return found[0] if len(axes) == 1 else tuple(found)


def define_list_op(
    name: str,
    inputs: Sequence[str],
    sums: tuple[int, ...],
    *,
    draws: bool = False,
    chooses: bool = False,
) -> ListOp:
    """Register an op that makes tables [filters, *sums] out of lists of tensors, weights first.

    It gives two packed tables, by rows and by columns, the one not asked for with no filters. If
    it draws random signs it is told their seed and a stream for each weight. If it `chooses` it is
    told which sums are wanted, and those that are not are NaN.
    """
    count = len(inputs)
    every = 2 ** sums[0] - 1 if chooses else 0

    names = [name + "[{}]" for name in inputs]

    def empty(*args: Any) -> tuple[Tensor, Tensor]:
        filters = _filters([w.shape for w in args[0]], *args[count : count + 3])
        return _empty_tables(sums, args[0][0], filters)

    def run(*args: Any) -> tuple[Tensor, Tensor]:
        lists, told = args[:count], args[count:]
        wanted = every
        if chooses and isinstance(told[-1], int):  # PyTorch leaves out what is the default
            wanted, told = told[-1], told[:-1]
            if not 0 < wanted <= every:
                raise ValueError(f"sums: {wanted} has no such bits; pass 1 to {every}")
        groups, rows, cols, *draw, backend = told
        seed, streams = (draw[:1], draw[1]) if draws else ([], None)
        shapes = check_launch(lists, names, groups, (0, 1) if cols else (0,), streams)
        kind = lists[0][0].device, lists[0][0].dtype, backend
        compute = kernel(name, *kind)
        if wanted != every and kind[0].type == "cpu" and runs_natively(name, *kind):
            compute = partial(compute, sums=wanted)
        filters = _filters(shapes, groups, rows, cols)
        out = _empty_tables(sums, lists[0][0], filters)
        items = _items(out, dict(zip(inputs, lists, strict=True)), groups, filters, streams)
        if items:
            compute(items, *seed)
        if wanted != every:
            leave_out(
                [table for table, asked in zip(out, (rows, cols), strict=True) if asked], wanted
            )
        return out

    lists = ", ".join(f"Tensor[] {each}" for each in inputs)
    choice = f", int sums={every}" if chooses else ""
    signs = "int seed, int[] streams, " if draws else ""
    op = define(
        f"{name}({lists}, int[] groups, bool rows, bool cols, {signs}str? backend{choice})"
        " -> (Tensor, Tensor)",
        run,
        empty,
        _tags(),
    )
    return ListOp(name, sums, op)


def _tags() -> list[torch.Tag]:
    """Keeps the op out of CUDA graphs of torch.compile where Triton runs it by default.

    Triton's kernels find tensors by a table of addresses, which cannot be copied to the GPU during
    a capture, and a captured call sees new addresses. The native kernels are told addresses by
    value. A capture of one's own works with both, once the op was called on the same tensors.
    """
    by_value = native._native is not None and bool(native._native.cuda_version)
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)  # there since PyTorch 2.8
    return [] if by_value or tag is None else [tag]


def _items(
    out: tuple[Tensor, Tensor],
    lists: Mapping[str, Sequence[Tensor]],
    groups: Sequence[int],
    filters: Sequence[list[int]],
    streams: Sequence[int] | None,
) -> list[ParameterItem]:
    """Each parameter with its part of the packed tables; empty ones, whose sums are 0, are done."""
    weights = lists["weights"]
    nothing = [None] * len(weights)
    grads, hvps = lists.get("grads", nothing), lists.get("hvps", nothing)
    row_outs, col_outs = (
        _split(table, counts) if counts else nothing
        for table, counts in zip(out, filters, strict=True)
    )
    numbers = streams or [0] * len(weights)
    items = []
    for weight, grad, hvp, n, row_out, col_out, stream in zip(
        weights, grads, hvps, groups, row_outs, col_outs, numbers, strict=True
    ):
        if weight.numel():
            items.append(parameter_item(weight, grad, hvp, n, row_out, col_out, stream))
            continue
        for table in (row_out, col_out):
            if table is not None:
                table.zero_()
    return items


def _empty_tables(
    sums: tuple[int, ...], like: Tensor, filters: Sequence[list[int]]
) -> tuple[Tensor, Tensor]:
    """The packed tables, unwritten."""
    dtype = accumulator(like.dtype)
    row_table, col_table = (like.new_empty((sum(n), *sums), dtype=dtype) for n in filters)
    return row_table, col_table


def _filters(
    shapes: Sequence[torch.Size], groups: Sequence[int], rows: bool, cols: bool
) -> tuple[list[int], list[int]]:
    """Of each weight, by rows and by columns; no list where they are not wanted."""
    return (
        [shape[0] for shape in shapes] if rows else [],
        [shape[1] * n for shape, n in zip(shapes, groups, strict=True)] if cols else [],
    )


def _split(table: Tensor, counts: list[int]) -> list[Tensor]:
    """Its parts, in its memory. Autograd does not keep them together as views of one tensor, which
    takes longer and would forbid writing to one of them in place: no part reaches into another,
    and the whole is not handed out."""
    return list(torch.unsafe_split_with_sizes(table, counts)) if len(counts) > 1 else [table]


def _through_the_dispatcher(
    op: ListOp,
    weights: object,
    others: dict[str, object],
    groups: int | Sequence[int],
    axes: tuple[int, ...],
    draw: Draw | None,
    sums: int | None,
    backend: str | None,
    finish: Callable[[Tensor], object] | None,
    whole: bool,
) -> list[list[Tensor]] | list[Tensor]:
    """One list of tables per axis asked for; one launch for each device and for float64. If they
    are to stay `whole`, one packed table per axis, of one launch."""
    lists = as_lists({"weights": weights, **others})
    names: Sequence[str] = ("weights", *others)
    if not isinstance(weights, Tensor):
        names = [name + "[{}]" for name in names]
    each_groups = check_groups(groups, len(lists[0]))
    streams = None if draw is None else check_streams(draw.streams, len(lists[0]))
    shapes = check_lists(lists, each_groups, axes, names)

    def launch(places: Sequence[int]) -> tuple[list[Tensor], list[list[int]]]:
        every: list[list[Any]] = [*lists, each_groups]
        of_part = [[each[i] for i in places] for each in every]
        drawn = () if draw is None or streams is None else (draw.seed, [streams[i] for i in places])
        rows, cols = 0 in axes, 1 in axes
        chosen = () if sums is None else (sums,)
        packed = op.call(*of_part, rows, cols, *drawn, backend, *chosen)
        filters = _filters([shapes[i] for i in places], of_part[-1], rows, cols)
        if finish is not None:
            for table in packed:
                finish(table)
        return [packed[axis] for axis in axes], [filters[axis] for axis in axes]

    parts = by_kind(lists[0])
    if whole:
        if len(parts) > 1:
            raise ValueError(
                "packed: one table takes tensors of one device, all of them float64 or none; "
                "call once for each, or leave packed=False"
            )
        return launch(parts[0])[0] if parts else [torch.empty(0, *op.sums) for _ in axes]
    found: list[list[Tensor]] = [[torch.empty(0)] * len(shapes) for _ in axes]
    for part in parts:
        for every_table, packed, filters in zip(found, *launch(part), strict=True):
            for i, table in zip(part, _split(packed, filters), strict=True):
                every_table[i] = table
    return found

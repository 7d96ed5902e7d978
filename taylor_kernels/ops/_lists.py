"""What the ops over parameters share: tensors or lists of them in, a table of sums per filter out.

`tables` is the public side: it checks what it is given, splits lists by device and float64, and
hands out views of the packed tables. `parameters` and `empty_tables` are the inner side, of the
op that torch.library knows, which computes the packed tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from taylor_kernels.backends import check_name
from taylor_kernels.layout import ParameterItem, accumulator, parameter_item
from taylor_kernels.ops._checks import check_like, check_tensor, is_pair

#: What the lists beside the weights hold, for messages.
_HOLDS = {"grads": "gradients", "hvps": "Hessian-vector products"}

#: launch(places in the caller's lists, the lists, groups, rows, cols): the packed tables.
Launch = Callable[
    [Sequence[int], "list[list[Tensor]]", "list[int]", bool, bool], "tuple[Tensor, Tensor]"
]


def tables(
    launch: Launch,
    dim: int | tuple[int, int],
    groups: int | Sequence[int],
    backend: str | None,
    weights: object,
    **others: object,
) -> Any:
    """A table for a tensor, a list of them for a sequence; a pair of either for dim=(0, 1)."""
    check_name(backend)
    axes = _axes(dim)
    lists = _as_lists({"weights": weights, **others})
    names = ("weights", *others)
    if not isinstance(weights, Tensor):
        names = tuple(name + "[{}]" for name in names)
    each_groups = _each_groups(groups, len(lists[0]))
    _check(lists, each_groups, axes, names)
    found = _split_and_launch(launch, lists, each_groups, axes)
    if isinstance(weights, Tensor):
        return found[0][0] if len(axes) == 1 else (found[0][0], found[1][0])
    return found[0] if len(axes) == 1 else (found[0], found[1])


def parameters(
    out: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    hvps: Sequence[Tensor] | None,
    groups: Sequence[int],
    rows: bool,
    cols: bool,
    streams: Sequence[int] | None = None,
) -> list[ParameterItem]:
    """Each parameter with its part of the packed tables; empty ones, whose sums are 0, are done."""
    nothing = [None] * len(weights)
    row_outs, col_outs = (
        table.split(_filters(weights, groups, axis)) if wanted else nothing
        for axis, (table, wanted) in enumerate(zip(out, (rows, cols), strict=True))
    )
    items = []
    for weight, grad, hvp, n, row_out, col_out, stream in zip(
        weights,
        grads or nothing,
        hvps or nothing,
        groups,
        row_outs,
        col_outs,
        streams or [0] * len(weights),
        strict=True,
    ):
        if weight.numel():
            items.append(parameter_item(weight, grad, hvp, n, row_out, col_out, stream))
            continue
        for table in (row_out, col_out):
            if table is not None:
                table.zero_()
    return items


def empty_tables(
    sums: tuple[int, ...], weights: Sequence[Tensor], groups: Sequence[int], rows: bool, cols: bool
) -> tuple[Tensor, Tensor]:
    """The packed tables, unwritten: [filters, *sums] by rows and by columns, [0, *sums] if not
    wanted."""
    dtype = accumulator(weights[0].dtype)
    row_table, col_table = (
        weights[0].new_empty(
            (sum(_filters(weights, groups, axis)) if wanted else 0, *sums), dtype=dtype
        )
        for axis, wanted in enumerate((rows, cols))
    )
    return row_table, col_table


def _by_kind(tensors: Sequence[Tensor]) -> list[Sequence[int]]:
    """The places of those that share a device and are float64 or not: what one launch takes."""
    if len({(t.device, t.dtype is torch.float64) for t in tensors}) == 1:
        return [range(len(tensors))]
    parts: dict[tuple[torch.device, bool], list[int]] = {}
    for i, tensor in enumerate(tensors):
        parts.setdefault((tensor.device, tensor.dtype is torch.float64), []).append(i)
    return list(parts.values())


def _as_lists(inputs: dict[str, object]) -> list[list[Tensor]]:
    """A list for each name; a single tensor is a list of one."""
    weights = inputs["weights"]
    if isinstance(weights, Tensor):
        for name, value in inputs.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{name}: expected a torch.Tensor like weights, got {type(value).__name__}"
                )
        return [[value] for value in inputs.values() if isinstance(value, Tensor)]
    lists: list[list[Tensor]] = []
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            raise TypeError(
                f"{name}: got one tensor for a sequence of weights; "
                f"pass a sequence of {_HOLDS[name]}"
            )
        if not isinstance(value, Sequence):
            raise TypeError(
                f"{name}: expected a tensor or a sequence of tensors, got {type(value).__name__}"
            )
        lists.append(list(value))
        if len(lists[-1]) != len(lists[0]):
            raise ValueError(
                f"{name}: {len(value)} {_HOLDS[name]} for {len(lists[0])} weights; "
                "pass one for each"
            )
    return lists


def _check(
    lists: list[list[Tensor]], groups: list[int], axes: tuple[int, ...], names: tuple[str, ...]
) -> None:
    weights = lists[0]
    for name, others in zip(names[1:], lists[1:], strict=True):
        for i, (weight, other) in enumerate(zip(weights, others, strict=True)):
            if not is_pair(weight, other):
                check_tensor(weight, names[0].format(i))
                check_like(other, name.format(i), weight, names[0].format(i))
    for i, (weight, n) in enumerate(zip(weights, groups, strict=True)):
        if n > 1 or not 1 < weight.dim() <= 5:
            _check_shape(weight, n, axes, names[0].format(i))


def _split_and_launch(
    launch: Launch, lists: list[list[Tensor]], groups: list[int], axes: tuple[int, ...]
) -> list[list[Tensor]]:
    """One list of tables per axis asked for; one launch for each device and for float64."""
    weights = lists[0]
    parts = _by_kind(weights)
    if len(parts) == 1:
        return _launch(launch, parts[0], lists, groups, axes)
    found: list[list[Tensor]] = [[torch.empty(0)] * len(weights) for _ in axes]
    for part in parts:
        picked = [[tensors[i] for i in part] for tensors in lists]
        of_part = _launch(launch, part, picked, [groups[i] for i in part], axes)
        for whole, axis_tables in zip(found, of_part, strict=True):
            for i, table in zip(part, axis_tables, strict=True):
                whole[i] = table
    return found


def _launch(
    launch: Launch,
    places: Sequence[int],
    lists: list[list[Tensor]],
    groups: list[int],
    axes: tuple[int, ...],
) -> list[list[Tensor]]:
    with torch.no_grad():
        packed = launch(places, lists, groups, 0 in axes, 1 in axes)
    return [list(packed[axis].split(_filters(lists[0], groups, axis))) for axis in axes]


def _axes(dim: int | tuple[int, int]) -> tuple[int, ...]:
    axes = dim if isinstance(dim, tuple) else (dim,)
    if axes not in ((0,), (1,), (0, 1)):
        raise ValueError(f"dim: {dim!r} is not one of 0, 1 and (0, 1)")
    return axes


def _each_groups(groups: int | Sequence[int], count: int) -> list[int]:
    if not isinstance(groups, (int, Sequence)):
        raise TypeError(f"groups: expected an int or one for each tensor, got {groups!r}")
    each = [groups] * count if isinstance(groups, int) else list(groups)
    if len(each) != count:
        raise ValueError(
            f"groups: {len(each)} values for {count} weights; pass an int or one for each"
        )
    for value in each:
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"groups: {value!r} is not a positive integer")
    return each


def _check_shape(weight: Tensor, groups: int, axes: tuple[int, ...], name: str) -> None:
    if not 1 <= weight.dim() <= 5:
        raise ValueError(f"{name}: has {weight.dim()} dimensions; a parameter has 1 to 5")
    if 1 in axes and weight.dim() == 1:
        raise ValueError(
            f"{name}: has no dim 1 (shape {tuple(weight.shape)}); use dim=0 for vectors"
        )
    if weight.size(0) % groups:
        raise ValueError(f"groups: {groups} does not divide the {weight.size(0)} rows of {name}")


def _filters(weights: Sequence[Tensor], groups: Sequence[int], axis: int) -> list[int]:
    """Of each weight."""
    if axis == 0:
        return [w.size(0) for w in weights]
    return [w.size(1) * n for w, n in zip(weights, groups, strict=True)]

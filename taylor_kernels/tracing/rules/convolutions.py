"""Convolutions, of groups too: what they do to channels and to places."""

from __future__ import annotations

from math import prod
from typing import Any

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.attributes import rules_of, tie
from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.rules.elementwise import repeated_as
from taylor_kernels.tracing.rules.products import add_bias, layer
from taylor_kernels.tracing.run.calls import Call, rule


@rule(
    "convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "_convolution", "convolution_overrideable", "mkldnn_convolution",
    "conv_depthwise3d", "_conv_depthwise2d", "thnn_conv2d", "slow_conv3d",
)  # fmt: skip
def convolution(call: Call) -> Labels:
    """Grouped ones see their channels as a grid: groups by channels of a group."""
    source, weight = call.of(call.arg("input", "self")), call.of(call.args["weight"])
    transposed = bool(call.args.get("transposed")) or "transpose" in call.name
    spatial = len(weight.shape) - 2
    groups = call.args.get("groups", 1)
    result = Labels.fixed(call.out.shape)
    for dim in range(-spatial, 0):
        call.refuse(weight.dims[dim], "is a place of a kernel")
        if _is_alone(call, weight, dim):
            result.dims[dim] = source.dims[dim]
            result.zero[dim] = source.is_zero(dim) and call.args.get("bias") is None
        else:
            call.mix(source.dims[dim])
    batched = len(source.shape) == spatial + 2
    if batched:
        result.dims[0], result.zero[0] = source.dims[0], False
    channels = call.atoms(source, -spatial - 1)
    rows, columns = weight.dims[0], weight.dims[1]
    if _is_one_kernel(weight, groups):
        # A blur, of as many kernels as the image has channels.
        repeated_as(call, channels, weight, 0)
        tie(call, groups, channels, weak=True)
        result.dims[-spatial - 1], result.zero[-spatial - 1] = (
            channels,
            source.is_zero(-spatial - 1),
        )
        add_bias(call, call.args.get("bias"), result, -spatial - 1)
        return result
    if groups == 1:
        inputs, outputs, axis = (rows, columns, None) if transposed else (columns, rows, None)
    else:
        inputs, outputs, axis = _grouped(call, rows, columns, groups, transposed)
    call.join(channels, inputs)
    places = prod(source.shape if transposed else result.shape)
    layer(call, weight, inputs, outputs, axis, places * prod(weight.shape[1:]))
    result.dims[-spatial - 1], result.zero[-spatial - 1] = outputs, weight.is_zero(int(transposed))
    add_bias(call, call.args.get("bias"), result, -spatial - 1)
    return result


def _is_alone(call: Call, weight: Labels, dim: int) -> bool:
    """Whether a convolution leaves the places along a dimension where they are, each by itself."""

    def along(argument: str, otherwise: int) -> Any:
        value = call.args.get(argument, otherwise)
        return value[dim if len(value) > 1 else 0] if isinstance(value, (list, tuple)) else value

    one = weight.shape[dim] == 1 and along("stride", 1) == 1
    return one and along("padding", 0) in (0, "same", "valid")


def _is_one_kernel(weight: Labels, groups: int) -> bool:
    """Whether a weight is one kernel that code has repeated for each channel of its own group."""
    one = weight.is_uniform or (weight.dims[0] is None and 0 in weight.repeated)
    return one and groups > 1 and weight.shape[:2] == (groups, 1)


def _grouped(
    call: Call, rows: Vector | None, columns: Vector | None, groups: int, transposed: bool
) -> tuple[Vector | None, Vector | None, Vector | None]:
    """The input channels, the output channels and the groups of a grouped convolution."""
    record, where = call.record, call.where
    if columns is None and call.of(call.args["weight"]).shape[1] == 1:
        columns = record.fresh(1)  # a depthwise weight seen as a matrix and back, as in Mamba
    if rows is None or columns is None:
        for vector in (rows, columns):
            call.refuse(vector, "belongs to a grouped weight that is computed")
        return None, None, None
    module = call.running
    # Whole groups can go where the number of groups is an attribute that follows;
    known = "groups" in rules_of(module) if module is not None else False
    # and as many groups as channels are given by these, mostly.
    depthwise = rows.size == groups and columns.size == 1
    may = [0, 1] if known or depthwise or tie(call, groups, None) else [1]
    axis, _ = record.grid(rows.reshape(groups, -1), where, "rows", may)
    if axis is None:
        axis = record.fresh(groups)
        record.fix(axis, call.reason("is a group whose channels are shared"))
    # The weight's second dimension counts within a group, on the side that its first does not.
    other = axis if columns.size == 1 else None
    if columns.size == 1:
        call.refuse(columns, "is the only channel of each group")
    else:
        other = record.fresh(groups * columns.size)
        axis_again, inside_again = record.grid(other.reshape(groups, -1), where, "groups", may)
        call.join(axis_again, axis)
        call.join(inside_again, columns)
    if 0 in may and not known:
        tie(call, groups, axis)
    inputs, outputs = (rows, other) if transposed else (other, rows)
    return inputs, outputs, axis

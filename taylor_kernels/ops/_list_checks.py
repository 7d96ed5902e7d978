"""Checks of lists of parameters and of what belongs to each: lengths, shapes, kinds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taylor_kernels.layout import FLOATS
from taylor_kernels.ops._checks import (
    alike,
    check_like,
    check_shape,
    check_streams,
    check_tensor,
    quick_shapes,
)

#: What the lists beside the weights hold, for messages.
_HOLDS = {"grads": "gradients", "hvps": "Hessian-vector products"}


def as_lists(inputs: dict[str, object]) -> list[list[Tensor]]:
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


def check_lists(
    lists: Sequence[list[Tensor]], groups: list[int], axes: tuple[int, ...], names: Sequence[str]
) -> list[torch.Size]:
    """The shapes of the weights, or an error that names what does not fit."""
    weights = lists[0]
    shapes = quick_shapes(lists)
    if shapes is None:
        for name, others in zip(names[1:], lists[1:], strict=True):
            for i, (weight, other) in enumerate(zip(weights, others, strict=True)):
                check_tensor(weight, names[0].format(i))
                check_like(other, name.format(i), weight, names[0].format(i))
        shapes = [weight.shape for weight in weights]
    for i, (shape, n) in enumerate(zip(shapes, groups, strict=True)):
        if n > 1 or not 1 < len(shape) <= 5:
            check_shape(shape, n, axes, names[0].format(i))
    return shapes


def check_launch(
    lists: Sequence[list[Tensor]],
    names: Sequence[str],
    groups: list[int],
    axes: tuple[int, ...],
    streams: Sequence[int] | None,
) -> list[torch.Size]:
    """The shapes of the weights of one launch, or an error.

    The kernels trust what they are told, and the op may be called by others than `tables`.
    """
    weights, *others = lists
    count = len(weights)
    if not count:
        raise ValueError("weights: no tensors; pass at least one")
    if len(groups) != count or any(len(each) != count for each in others):
        raise ValueError(f"weights: {count} of them; pass {count} of all that belong to them")
    if min(groups) < 1:
        raise ValueError(f"groups: {min(groups)} is not a positive integer")
    if streams is not None:
        check_streams(streams, count)
    if len(by_kind(weights)) > 1:
        raise ValueError(
            "weights: one call takes tensors of one device, all of them float64 or none"
        )
    shapes = [weight.shape for weight in weights]
    for i, (weight, shape, n) in enumerate(zip(weights, shapes, groups, strict=True)):
        if weight.dtype not in FLOATS or weight.layout is not torch.strided:
            check_tensor(weight, names[0].format(i))
        if n > 1 or not 1 < len(shape) <= 5:
            check_shape(shape, n, axes, names[0].format(i))
    for name, each in zip(names[1:], others, strict=True):
        if not alike(each, weights):
            for i, (tensor, weight) in enumerate(zip(each, weights, strict=True)):
                check_like(tensor, name.format(i), weight, names[0].format(i))
    return shapes


def by_kind(tensors: Sequence[Tensor]) -> list[Sequence[int]]:
    """The places of those that share a device and are float64 or not: what one launch takes."""
    if len({t.device for t in tensors}) == len({t.dtype is torch.float64 for t in tensors}) == 1:
        return [range(len(tensors))]
    parts: dict[tuple[torch.device, bool], list[int]] = {}
    for i, tensor in enumerate(tensors):
        parts.setdefault((tensor.device, tensor.dtype is torch.float64), []).append(i)
    return list(parts.values())

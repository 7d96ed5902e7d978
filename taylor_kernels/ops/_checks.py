"""Checks that every op makes on the tensors it is given, once, before anything is launched."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from taylor_kernels.checks import integer
from taylor_kernels.layout import FLOATS

_FLOATS = frozenset(FLOATS)
_PLAIN = (Tensor, torch.nn.Parameter)  # most are of these classes


def quick_shapes(lists: Sequence[list[Any]]) -> list[torch.Size] | None:
    """The shapes of the first list, if all lists match it as check_like() wants, on one device.

    None: check_tensor() and check_like() say what is wrong, if anything is. A model has hundreds
    of tensors, so each of their attributes is read once.
    """
    device = lists[0][0].device if lists[0] and isinstance(lists[0][0], Tensor) else None
    if device is None or device.type == "meta":
        return None
    for tensors in lists:
        for t in tensors:
            if (
                not (type(t) in _PLAIN or _is_plain(type(t)))
                or t.device != device
                or t.layout is not torch.strided
                or t.is_nested
            ):
                return None
    dtypes = [[t.dtype for t in tensors] for tensors in lists]
    shapes = [[t.shape for t in tensors] for tensors in lists]
    if not _FLOATS.issuperset(dtypes[0]) or any(each != dtypes[0] for each in dtypes[1:]):
        return None
    return shapes[0] if all(each == shapes[0] for each in shapes[1:]) else None


def alike(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether each has the shape, dtype, device and layout of its place in the other list."""
    for t, other in zip(tensors, others, strict=True):
        if (
            t.shape != other.shape
            or t.dtype is not other.dtype
            or t.device != other.device
            or t.layout is not other.layout
        ):
            return False
    return True


def check_tensor(tensor: object, name: str) -> None:
    """A dense tensor of a floating dtype with storage behind it, or an error that names it."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor, got {type(tensor).__name__}{_hint(tensor)}"
        )
    if not (type(tensor) in _PLAIN or _is_plain(type(tensor))):
        raise TypeError(
            f"{name}: a DTensor is not supported; pass tensor.full_tensor(), or score with the "
            "criteria of gates, which do not read weights"
        )
    if tensor.dtype not in FLOATS:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise TypeError(
            f"{name}: dtype {tensor.dtype} is not supported; convert it to one of {allowed}"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: layout {tensor.layout} is not supported; call .to_dense() first")
    if tensor.is_nested:
        raise TypeError(f"{name}: nested tensors are not supported; pass its parts as a list")
    if tensor.device.type == "meta":
        raise TypeError(
            f"{name}: a meta tensor has no values; move the model to a real device first"
        )


def check_like(tensor: object, name: str, other: Tensor, other_name: str) -> None:
    """`tensor` has the shape, dtype and device of `other`, which was checked before it."""
    check_tensor(tensor, name)
    assert isinstance(tensor, Tensor)
    for what in ("shape", "dtype", "device"):
        got, expected = getattr(tensor, what), getattr(other, what)
        if got != expected:
            if what == "shape":
                got, expected = tuple(got), tuple(expected)
            raise ValueError(
                f"{name}: {what} {got} does not match {other_name}, which has {what} {expected}"
            )


def check_seed(seed: Any) -> int:
    """As a signed integer of 64 bits, or an error; the range is that of `torch.manual_seed`."""
    seed = integer("seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: {seed} does not fit into 64 bits")
    return seed - 2**64 if seed >= 2**63 else seed


def check_streams(streams: object, count: int) -> Sequence[int]:
    """A number for each tensor, by default its place in the list."""
    if streams is None:
        return range(count)
    if not isinstance(streams, Sequence):
        raise TypeError(f"streams: expected one int for each tensor, got {streams!r}")
    if len(streams) != count:
        raise ValueError(f"streams: {len(streams)} values for {count} tensors; pass one for each")
    for stream in streams:
        if not isinstance(stream, int) or not 0 <= stream < 2**32:
            raise ValueError(f"streams: {stream!r} is not an integer from 0 to 2**32 - 1")
    return streams


def check_axes(dim: int | tuple[int, int]) -> tuple[int, ...]:
    """The axes that tables are made for, or an error."""
    try:
        axes = tuple(operator.index(axis) for axis in (dim if isinstance(dim, tuple) else (dim,)))
    except TypeError:
        axes = ()
    if axes not in ((0,), (1,), (0, 1)):
        raise ValueError(f"dim: {dim!r:.80} is not one of 0, 1 and (0, 1)")
    return axes


def check_groups(groups: int | Sequence[int], count: int) -> list[int]:
    """A number of groups for each of `count` weights, or an error."""
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


def check_shape(shape: torch.Size, groups: int, axes: tuple[int, ...], name: str) -> None:
    """A parameter of this shape has the axes and can be cut into the groups, or an error."""
    if not 1 <= len(shape) <= 5:
        raise ValueError(f"{name}: has {len(shape)} dimensions; a parameter has 1 to 5")
    if 1 in axes and len(shape) == 1:
        raise ValueError(f"{name}: has no dim 1 (shape {tuple(shape)}); use dim=0 for vectors")
    if shape[0] % groups:
        raise ValueError(f"groups: {groups} does not divide the {shape[0]} rows of {name}")


def _is_plain(kind: type) -> bool:
    """Whether a class is that of tensors that hold all of their values, which DTensors do not."""
    return issubclass(kind, Tensor) and not hasattr(kind, "full_tensor")


def _hint(value: object) -> str:
    return "; has backward() reached this parameter?" if value is None else ""

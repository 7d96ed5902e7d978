"""What lets runs of a model be compared: double precision, and pools that fit small images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from taylor_kernels.pruning.proof.alone import HIDING, is_alone
from taylor_kernels.pruning.proof.defaults import WIDER, InDoubleBelow, made_in_double, wider
from taylor_kernels.tracing.notes.operations import per_dimension

_CASTS: dict[Any, Any] = {
    Tensor.half: Tensor.double,
    Tensor.bfloat16: Tensor.double,
    Tensor.float: Tensor.double,
}
_POOLS = {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}


class SmallPools(TorchFunctionMode):
    """Windows that averages are taken over are no larger than an image that was cut down.

    Padded ones fit as they are.

    Attributes:
        idle: every function has been run as it was called.
        alone: a softmax or the like has been given single numbers, which it hides.
    """

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.alone = True, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        if func in HIDING:
            self.alone |= is_alone(func, args, kwargs or {})
        elif func in _POOLS and len(args) > 1:
            image, kernel, *rest = args
            if rest[1] if len(rest) > 1 else (kwargs or {}).get("padding", 0):
                return func(*args, **(kwargs or {}))
            sizes = image.shape[-3:] if func is F.avg_pool3d else image.shape[-2:]
            sizes = image.shape[-1:] if func is F.avg_pool1d else sizes
            kernel = [kernel] * len(sizes) if isinstance(kernel, int) else kernel
            fitting = [min(pair) for pair in zip(kernel, sizes, strict=True)]
            self.idle &= fitting == list(kernel)
            args = (image, fitting, *rest)
        return func(*args, **(kwargs or {}))


class InDouble(SmallPools):
    """What code would cast to, or make in, a lower precision is in double precision.

    So is what they make in the default precision, which is a setting of the process and stays as it
    is. It is one mode with `SmallPools`, since every mode adds to the time of every operation.

    Args:
        below: also what operations make that no mode for functions sees: those of scripted code,
            and of `torch.Tensor(...)`. It costs time at every operation.
    """

    def __init__(self, *, below: bool = False) -> None:
        super().__init__()
        self._below = InDoubleBelow() if below else nullcontext()

    def __enter__(self) -> InDouble:
        self._below.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._below.__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        for value in args:
            if type(value) is torch.dtype:
                args = tuple(self._wider(value) for value in args)
                break
        if kwargs:
            kwargs = {name: self._wider(value) for name, value in kwargs.items()}
        if func not in _SPECIAL:
            out = func(*args, **kwargs) if kwargs else func(*args)
            if out.__class__ is Tensor and out.dtype in WIDER:
                self.idle = False
                return made_in_double(func, args, kwargs or {}, out)
            return out
        if func is torch.result_type:
            return self._wider(func(*args, **(kwargs or {})))
        if func in _GROUPED and (out := _grouped(*args, **(kwargs or {}))) is not None:
            self.idle = False
            return out
        self.idle &= func not in _CASTS
        return super().__torch_function__(_CASTS.get(func, func), types, args, kwargs)

    def _wider(self, value: Any) -> Any:
        found = wider(value)
        self.idle &= found is value
        return found


#: Whose groups are run at once, if what they read is no more than so many numbers: 128 MiB. PyTorch
#: runs as few as these in no more time.
_GROUPED = {F.conv1d, F.conv2d, F.conv3d}
_MOST, _FEW_GROUPS = 2**24, 4
#: Functions that are not run as they are.
_SPECIAL = {*_CASTS, *_GROUPED, *_POOLS, *HIDING, torch.result_type}


def _grouped(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """A convolution of many groups, as a product of matrices for each; None for others.

    In double precision PyTorch runs them group after group, a thousand calls for a depthwise layer.
    What does not fit together is left to PyTorch, which says so.
    """
    n = weight.dim() - 2
    fits = (
        groups > _FEW_GROUPS
        and input.numel() > 0
        and input.dim() == n + 2
        and input.size(1) == weight.size(1) * groups
        and weight.size(0) % groups == 0
        and input.dtype == weight.dtype == torch.float64
        and (bias is None or bias.shape == weight.shape[:1])
    )
    if not fits or isinstance(padding, str):
        return None
    strides, paddings, dilations = (
        per_dimension(value, n) for value in (stride, padding, dilation)
    )
    padded = F.pad(input, [pad for pad in reversed(paddings) for _ in range(2)])
    kernel = weight.shape[2:]
    sizes = [
        (size - every * (k - 1) - 1) // step + 1
        for size, every, k, step in zip(padded.shape[2:], dilations, kernel, strides, strict=True)
    ]
    if min(sizes) < 1 or input.size(1) * len(input) * prod((*kernel, *sizes)) > _MOST:
        return None
    steps = padded.stride()[2:]
    moves = [step * by for step, by in zip(steps, strides, strict=True)]
    inside = [step * every for step, every in zip(steps, dilations, strict=True)]
    windows = padded.as_strided(
        (*padded.shape[:2], *kernel, *sizes), (*padded.stride()[:2], *inside, *moves)
    )
    columns = windows.reshape(len(input), groups, weight[0].numel(), -1)
    out = weight.reshape(groups, -1, columns.size(2)) @ columns
    out = out.reshape(len(input), len(weight), *sizes)
    return out if bias is None else out + bias.view(-1, *[1] * n)

"""What the ops over a convolution's input and ∂L/∂output share: checks, and PyTorch's settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from taylor_kernels.ops._checks import check_tensor

#: The dimensions of a batch of images, by how many of them are the image's.
LAYOUTS = {1: "L", 2: "H, W", 3: "D, H, W"}


def check_convolution(
    input: Tensor,
    grad_output: Tensor,
    weight: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """What the kernels trust, of every call, through the public functions or not."""
    check_tensor(input, "input")
    check_tensor(grad_output, "grad_output")
    image = LAYOUTS[len(size) - 2]
    for name, tensor in (("input", input), ("grad_output", grad_output)):
        if tensor.dim() != len(size):
            raise ValueError(
                f"{name}: has shape {tuple(tensor.shape)}; expected [N, C, {image}], a single "
                f"example as [1, C, {image}]"
            )
    check_same(input, grad_output)
    if not _is_integer(groups) or groups < 1 or size[0] % groups:
        raise ValueError(
            f"groups: {groups!r} is not a positive integer that divides the {size[0]} filters of "
            "weight_size"
        )
    if input.size(1) != size[1] * groups:
        raise ValueError(
            f"input: has {input.size(1)} channels, but weight_size {tuple(size)} with "
            f"groups={groups} takes {size[1] * groups}"
        )
    expected = [input.size(0), size[0]]
    for dim in range(len(size) - 2):
        room = input.size(2 + dim) + 2 * padding[dim] - dilation[dim] * (size[2 + dim] - 1) - 1
        if room < 0:
            raise ValueError(
                f"weight_size: a kernel of {tuple(size[2:])} with dilation {tuple(dilation)} does "
                f"not fit an input of {tuple(input.shape[2:])} with padding {tuple(padding)}"
            )
        expected.append(room // stride[dim] + 1)
    if list(grad_output.shape) != expected:
        raise ValueError(
            f"grad_output: has shape {tuple(grad_output.shape)}; an input of {tuple(input.shape)}, "
            f"weight_size {tuple(size)}, stride {tuple(stride)}, padding {tuple(padding)} and "
            f"dilation {tuple(dilation)} give an output of {tuple(expected)}"
        )
    check_weight(weight, size, input)


def check_linear(input: Tensor, grad_output: Tensor) -> None:
    """[N, *, I] and [N, *, O] of one dtype and device, or an error."""
    check_tensor(input, "input")
    check_tensor(grad_output, "grad_output")
    for name, tensor in (("input", input), ("grad_output", grad_output)):
        if tensor.dim() < 2:
            raise ValueError(
                f"{name}: has shape {tuple(tensor.shape)}; expected [N, ..., features], a single "
                "example as [1, features]"
            )
    if input.shape[:-1] != grad_output.shape[:-1]:
        raise ValueError(
            f"grad_output: has shape {tuple(grad_output.shape)}; an input of {tuple(input.shape)} "
            f"gives an output of {(*input.shape[:-1], 'out_features')}"
        )
    check_same(input, grad_output)


def check_same(input: Tensor, grad_output: Tensor) -> None:
    """One dtype and one device, or an error."""
    for what in ("dtype", "device"):
        got, expected = getattr(grad_output, what), getattr(input, what)
        if got != expected:
            raise ValueError(
                f"grad_output: {what} {got} does not match input, which has {what} {expected}"
            )


def check_weight(weight: Tensor | None, size: Sequence[int], input: Tensor) -> None:
    """None, or a weight of this size beside the input, or an error."""
    if weight is None:
        return
    check_tensor(weight, "weight")
    if list(weight.shape) != list(size) or weight.device != input.device:
        raise ValueError(
            f"weight: shape {tuple(weight.shape)} on {weight.device}; expected {tuple(size)} on "
            f"{input.device}"
        )


def geometry_of(
    dims: int,
    weight_size: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[list[int], list[int], list[int], list[int], int]:
    """The arguments of a convolution over `dims` dimensions, with a number for each of these."""
    size = list(weight_size) if isinstance(weight_size, Sequence) else []
    return (
        _integers(size, dims + 2, "weight_size", 1, f"{dims + 2} integers", weight_size),
        _steps(stride, "stride", dims, 1),
        _steps(padding, "padding", dims, 0),
        _steps(dilation, "dilation", dims, 1),
        groups,
    )


def may_round(matmul: bool) -> bool:
    """Whether PyTorch's matrix products, or its convolutions, may round float32 to TF32.

    Asked inside of an op, since torch.compile cannot trace it and would keep the answer.
    """
    settings: Any = torch.backends.cuda.matmul if matmul else torch.backends.cudnn
    operator = settings if matmul else getattr(settings, "conv", settings)
    if hasattr(operator, "fp32_precision"):  # allow_tf32 raises where this was set to differ
        return bool(operator.fp32_precision == "tf32")
    return bool(settings.allow_tf32)  # before PyTorch 2.9


def _steps(value: int | Sequence[int], name: str, dims: int, least: int) -> list[int]:
    """From a sequence, or from one number for all dimensions."""
    more = {1: "a list of one", 2: "a pair of integers", 3: "three integers"}
    found = list(value) if isinstance(value, Sequence) else dims * [value]
    return _integers(found, dims, name, least, f"an integer or {more[dims]}", value)


def _integers(
    found: list[int], count: int, name: str, least: int, wanted: str, value: object
) -> list[int]:
    if len(found) != count or any(not _is_integer(v) or v < least for v in found):
        hint = "; give the padding as numbers" if isinstance(value, str) else ""
        raise ValueError(f"{name}: expected {wanted} from {least} on, got {value!r}{hint}")
    return found


def _is_integer(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)

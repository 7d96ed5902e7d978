"""conv2d_fisher.cu on a CPU (emulated.py): what is planned for a case, and what comes of it."""

from __future__ import annotations

import torch
from torch import Tensor

from taylor_kernels.layout import Conv2dFisherArgs, conv2d_fisher_args
from tests.helpers.emulated import kernels, poisoned
from tests.helpers.fisher_cases import FisherCase
from tests.helpers.fisher_limits import Kernel

ROOM = 64 << 20  # bytes of workspace


def planned(args: Conv2dFisherArgs, room: int) -> tuple[Kernel, int, int]:
    """The kernel, its splits of the examples, the bytes that it takes of a workspace."""
    kernel, splits, workspace = kernels().fisher_plan(args, room)
    return Kernel(kernel), splits, workspace


def fisher(
    x: Tensor,
    dy: Tensor,
    case: FisherCase,
    weight: Tensor | None = None,
    tf32: bool = False,
    room: int = ROOM,
) -> Tensor:
    out = torch.full(case.size if weight is None else case.size[:1], float("nan"))
    args = conv2d_fisher_args(x, dy, weight, case.size, *case.geometry, tf32, out)
    assert kernels().fisher(args, room, poisoned(planned(args, room)[2])) == 0
    return out


def plan(
    case: FisherCase,
    dtype: torch.dtype,
    weighted: bool = False,
    room: int = ROOM,
    tf32: bool = True,
) -> tuple[Kernel, int, int]:
    """The same for tensors that nobody reads."""
    nothing = torch.empty(1, dtype=dtype)
    args = Conv2dFisherArgs(
        input=nothing,
        grad_output=nothing,
        weight=nothing if weighted else None,
        out=nothing,
        batch=case.shape[0],
        groups=case.groups,
        channels=case.size[1],
        filters=case.size[0] // case.groups,
        image=case.shape[2:],
        out_image=tuple(case.grad_shape[2:]),
        kernel=case.size[2:],
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        dtype=dtype,
        weight_dtype=torch.float32,
        input_channels_last=case.layout == "channels_last",
        grad_channels_last=case.grad_layout == "channels_last",
        tf32=tf32,
    )
    return planned(args, room)


def nearest_tf32(tensor: Tensor) -> Tensor:
    """float32 with 10 bits of fraction, ties away from zero."""
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

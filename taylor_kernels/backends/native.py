"""The C++ and CUDA kernels of csrc/, reached through the torch-free module `_native`.

That module takes integers only (pointers, sizes, a stream), so one build serves every PyTorch.
The order of the integers here is the order of the struct members in csrc/bindings.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from taylor_kernels.layout import Conv2dFisherArgs, GateGradientsArgs, ParameterItem, RademacherItem

try:
    _native: Any = import_module("taylor_kernels._native")
except ImportError as error:
    _native, _import_error = None, str(error)

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def filter_moments(items: Sequence[ParameterItem]) -> None:
    """Write the moments of all items, which share a device, into their outputs."""
    _run_parameters("filter_moments", items)


def second_order_moments(items: Sequence[ParameterItem]) -> None:
    """Write (Σ q, Σ q²) of all items, which share a device, into their outputs."""
    _run_parameters("second_order_moments", items)


def hutchinson_moments(items: Sequence[ParameterItem], seed: int) -> None:
    """Write Σ w² z (Hz) of all items, which share a device, into their outputs."""
    _run_parameters("hutchinson_moments", items, seed % 2**64)


def rademacher(items: Sequence[RademacherItem], seed: int) -> None:
    """Fill the outputs of all items, which share a device and dtype, with random signs."""
    table = [
        value
        for out, stream in items
        for value in (out.data_ptr(), out.numel(), _DTYPE_CODES[out.dtype], stream)
    ]
    device = items[0].out.device
    if device.type == "cpu":
        _native.rademacher_cpu(table, torch.get_num_threads(), seed % 2**64)
        return
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        _native.rademacher_cuda(table, stream, seed % 2**64)


def gate_gradients(args: GateGradientsArgs) -> None:
    """Write the gate gradients of one activation into `args.out`."""
    values = [
        args.output.data_ptr(),
        args.grad_output.data_ptr(),
        _pointer(args.bias),
        args.out.data_ptr(),
        args.batch,
        args.outer,
        args.channels,
        args.inner,
        _DTYPE_CODES[args.output.dtype],
    ]
    device = args.output.device
    if device.type == "cpu":
        _native.gate_gradients_cpu(values, torch.get_num_threads())
        return
    with torch.cuda.device(device):
        workspace = _workspace(_native.gate_gradients_cuda_workspace(values), device)
        stream = torch.cuda.current_stream(device).cuda_stream
        _native.gate_gradients_cuda(values, _pointer(workspace), stream)


def conv2d_fisher(args: Conv2dFisherArgs) -> None:
    """Write Σ_n of squared per-example weight gradients, or its filters' sums, into `args.out`."""
    values = [
        args.input.data_ptr(),
        args.grad_output.data_ptr(),
        _pointer(args.weight),
        args.out.data_ptr(),
        args.batch,
        args.groups,
        args.channels,
        args.filters,
        *args.image,
        *args.out_image,
        *args.kernel,
        *args.stride,
        *args.padding,
        *args.dilation,
        _DTYPE_CODES[args.input.dtype],
        _DTYPE_CODES[(args.input if args.weight is None else args.weight).dtype],
        args.input_channels_last,
        args.grad_channels_last,
        args.tf32,
    ]
    device = args.input.device
    if device.type == "cpu":
        _native.conv2d_fisher_cpu(values, torch.get_num_threads())
        return
    with torch.cuda.device(device):
        workspace = _workspace(_native.conv2d_fisher_cuda_workspace(values), device)
        stream = torch.cuda.current_stream(device).cuda_stream
        _native.conv2d_fisher_cuda(values, _pointer(workspace), stream)


def _run_parameters(op: str, items: Sequence[ParameterItem], *more: int) -> None:
    """Call a kernel for a list of parameters; `more` are its last arguments."""
    table = [
        value
        for item in items
        for value in (
            item.weight.data_ptr(),
            item.grad.data_ptr(),
            _pointer(item.hvp),
            *item[3:7],
            _pointer(item.row_out),
            _pointer(item.col_out),
            _DTYPE_CODES[item.weight.dtype],
            item.channels_last,
            item.stream,
        )
    ]
    device = items[0].weight.device
    if device.type == "cpu":
        getattr(_native, f"{op}_cpu")(table, torch.get_num_threads(), *more)
        return
    with torch.cuda.device(device):
        workspace = _workspace(getattr(_native, f"{op}_cuda_workspace")(table), device)
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(_native, f"{op}_cuda")(table, _pointer(workspace), stream, *more)


@cache
def cpu_status() -> tuple[bool, str]:
    if _native is None:
        return False, f"taylor_kernels._native did not load ({_import_error}); pip install ."
    return True, f"{_native.compiler}, {_native.cpu_isa()}"


@cache
def cuda_status() -> tuple[bool, str]:
    if _native is None:
        return cpu_status()
    if not _native.cuda_version:
        return False, (
            "the package was built without CUDA; rebuild it where nvcc is on PATH, "
            "with TAYLOR_KERNELS_CUDA=on"
        )
    built = f"CUDA {_native.cuda_version}, {_native.cuda_architectures}"
    if not torch.cuda.is_available():
        return False, f"built for {built}, but PyTorch sees no GPU"
    return True, built


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _workspace(size: int, device: torch.device) -> Tensor | None:
    return torch.empty(size, dtype=torch.uint8, device=device) if size else None

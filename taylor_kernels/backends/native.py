"""The C++ and CUDA kernels of csrc/, reached through the module `_native`.

That module knows no torch: it reads the members of layout.py's NamedTuples by their names, of a
tensor its address, so one build serves every PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch

#: What csrc/common/dtype.h calls them.
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}

try:
    _native: Any = import_module("taylor_kernels._native")
    _native.set_dtypes(**DTYPES)
except (
    ImportError,
    AttributeError,
) as error:  # AttributeError: built from other sources than these
    _native, _import_error = None, str(error)


def __getattr__(op: str) -> Callable[..., None]:
    """The kernels of an op, which has the name and the arguments of a function of reference.py."""
    if not hasattr(_native, f"{op}_cpu"):
        raise AttributeError(f"module {__name__!r} has no attribute {op!r}")
    return partial(_run, op)


def _run(op: str, call: Any, *seed: int) -> None:
    """Call the kernels of a NamedTuple of layout.py, or of a sequence of them, on their device."""
    record = call if hasattr(call, "_fields") else call[0]
    device = record[0].device  # the first member of each is a tensor
    seed = tuple(number % 2**64 for number in seed)
    if device.type == "cpu":
        getattr(_native, f"{op}_cpu")(call, torch.get_num_threads(), *seed)
        return
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        allocate = partial(torch.empty, dtype=torch.uint8, device=device)
        getattr(_native, f"{op}_cuda")(call, stream, allocate, *seed)


@cache
def cpu_status() -> tuple[bool, str]:
    if _native is None:
        return False, f"taylor_kernels._native did not load ({_import_error}); pip install ."
    return True, f"{_native.compiler}, {_native.cpu_isa()}"


@cache
def cuda_status() -> tuple[bool, str]:
    """Whether the kernels run on every GPU that PyTorch sees: what they were built for, or why not.

    One GPU of each capability is asked, the current one first, so that another backend takes over
    before a launch fails: asking makes a context on a GPU, which costs its memory.
    """
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
    current = torch.cuda.current_device()
    asked: dict[tuple[int, int], int] = {}
    for number in (current, *range(torch.cuda.device_count())):
        asked.setdefault(torch.cuda.get_device_capability(number), number)
    for number in asked.values():
        with torch.cuda.device(number):
            problem = _native.cuda_device_problem()
        if problem:
            name = f"cuda:{number} ({torch.cuda.get_device_name(number)})"
            return False, f"built for {built}, but the kernels do not run on {name}: {problem}"
    return True, built

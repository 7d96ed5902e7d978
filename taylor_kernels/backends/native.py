"""The C++ and CUDA kernels of csrc/, reached through the module `_native`.

That module is built without torch, so one build serves every PyTorch: it reads the members of
layout.py's NamedTuples by their names, of a tensor its address; and where the running PyTorch has
the functions of csrc/bindings/libtorch.h, from 2.6 on, it makes a call of the tensors themselves.

The CPU kernels are those of the best instruction set that the processor has, or of the one that the
environment names in TAYLOR_KERNELS_ISA when this module is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

#: What csrc/common/dtype.h calls them.
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}

try:
    _native: Any = import_module("taylor_kernels._native")
    _native.set_dtypes(**DTYPES)
except (ImportError, AttributeError) as error:
    # AttributeError: it was built from other sources than these.
    _native, _import_error = None, str(error)


def _connect() -> bool:
    """Tell the native module where PyTorch is; it tries what it finds there on a few tensors."""
    if _native is None:
        return False
    parameter = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64).t())
    samples = [torch.zeros(3), torch.zeros(2, 4, dtype=torch.bfloat16)[:, 1:], parameter]
    return bool(
        _native.connect_libtorch(
            torch._C.__file__,
            Tensor,
            torch.nn.Parameter,
            torch.empty,
            torch.are_deterministic_algorithms_enabled,
            samples,
            [torch._neg_view(sample) for sample in samples],
        )
    )


#: Whether `_native` makes calls of tensors.
plans_calls = _connect()


def choose_isa(name: str) -> None:
    """Run the CPU kernels of this instruction set, one of `_native.cpu_isas()`."""
    if _native is None:
        return
    if name not in _native.cpu_isas():
        some = ", ".join(_native.cpu_isas())
        raise ValueError(f"TAYLOR_KERNELS_ISA is {name!r}; this processor can run {some}")
    _native.set_cpu_isa(name)


if _ISA := os.environ.get("TAYLOR_KERNELS_ISA"):
    choose_isa(_ISA)


def __getattr__(op: str) -> Callable[..., None]:
    """The kernels of an op, which has the name and the arguments of a function of reference.py."""
    if not hasattr(_native, f"{op}_cpu"):
        raise AttributeError(f"module {__name__!r} has no attribute {op!r}")
    return partial(_run, op)


def _run(op: str, call: Any, *seed: int, sums: int | None = None) -> None:
    """Call the kernels of a NamedTuple of layout.py, or of a sequence of them, on their device."""
    record = call if hasattr(call, "_fields") else call[0]
    launch(op, call, record[0].device, *seed, sums=sums)  # the first member of each is a tensor


def launch(op: str, call: Any, device: torch.device, *seed: int, sums: int | None = None) -> None:
    """Run an op's kernels on a device: of a plan, whose outputs were set, or as above.

    On the CPU `sums` chooses those of filter_moments that are computed, a bit each.
    """
    if seed:
        seed = tuple(number % 2**64 for number in seed)
    if device.type == "cpu":
        run = getattr(_native, f"{op}_cpu")
        if sums is None:
            run(call, torch.get_num_threads(), *seed)
        else:
            run(call, torch.get_num_threads(), *seed, sums=sums)
        return
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        allocate = partial(torch.empty, dtype=torch.uint8, device=device)
        getattr(_native, f"{op}_cuda")(call, stream, allocate, *seed)


def fills(parts: Sequence[Sequence[tuple[int, Tensor, float]]]) -> Any:
    """What writes numbers into tensors of the CPU where they lie, all in one call; None where the
    native module cannot view tensors.

    Args:
        parts: for each tensor (dimension, indices [n] int64, value), in the order of writing.
    """
    if not plans_calls:
        return None
    indices: dict[int, Tensor] = {}  # by their ids: many tensors have the same
    described = []
    for tensor in parts:
        own = []
        for dim, index, value in tensor:
            held = indices.setdefault(id(index), index.cpu().contiguous())
            own.append((dim, held.data_ptr(), held.numel(), value))
        described.append(own)
    return _native.Fills(described)


def is_gradient_hook(hook: object) -> bool:
    """Whether this is a hook that `fills` gave."""
    return _native is not None and isinstance(hook, _native.GradientHook)


@cache
def cpu_status() -> tuple[bool, str]:
    """Whether the CPU kernels are there: compiler and instruction set, or why they are not."""
    if _native is None:
        return False, f"taylor_kernels._native did not load ({_import_error}); pip install ."
    return True, f"{_native.compiler}, {_native.cpu_isa()}"


def cuda_status() -> tuple[bool, str]:
    """Whether the kernels run on a GPU that PyTorch sees: what they were built for and which GPUs
    they do not run on, or why there is none.

    One GPU of each capability is asked, the current one first: asking makes a context on a GPU,
    which costs its memory.
    """
    if missing := _without_gpu():
        return False, missing
    current = torch.cuda.current_device()
    asked: dict[tuple[int, int], int] = {}
    for number in (current, *range(torch.cuda.device_count())):
        asked.setdefault(torch.cuda.get_device_capability(number), number)
    problems = [problem for number in asked.values() if (problem := _problem_on(number))]
    if len(problems) == len(asked):
        return False, f"built for {_built_for()}, but {'; '.join(problems)}"
    return True, "; ".join((_built_for(), *problems))


def cuda_status_on(device: torch.device) -> tuple[bool, str]:
    """The same of one GPU, which is asked before a launch on it could fail."""
    if _lasting.get(device.index) == "":
        return True, _built_for()
    if missing := _without_gpu():
        return False, missing
    number = torch.cuda.current_device() if device.index is None else device.index
    if problem := _problem_on(number):
        return False, f"built for {_built_for()}, but {problem}"
    return True, _built_for()


def _without_gpu() -> str:
    """Why there is nothing to ask a GPU, or an empty string."""
    if _native is None:
        return cpu_status()[1]
    if not _native.cuda_version:
        return (
            "the package was built without CUDA; rebuild it where nvcc is on PATH, "
            "with TAYLOR_KERNELS_CUDA=on"
        )
    if not torch.cuda.is_available():
        return f"built for {_built_for()}, but PyTorch sees no GPU"
    return ""


def _built_for() -> str:
    return f"CUDA {_native.cuda_version}, {_native.cuda_architectures}"


#: How the problems begin that a GPU keeps, in the words of csrc/cuda/device_check.cu.
_LASTING = ("they are compiled for other GPUs", "the driver is too old")
#: GPU -> its problem, or an empty string if it has none. Other errors may pass.
_lasting: dict[int, str] = {}


def _problem_on(number: int) -> str:
    """Why the kernels do not run on a GPU, or an empty string."""
    if number in _lasting:
        return _lasting[number]
    with torch.cuda.device(number):
        why = _native.cuda_device_problem()
    name = f"cuda:{number} ({torch.cuda.get_device_name(number)})"
    problem = f"the kernels do not run on {name}: {why}" if why else ""
    if not why or why.startswith(_LASTING):
        _lasting[number] = problem
    return problem

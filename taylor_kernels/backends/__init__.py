"""Which implementation of an op runs: the one place that chooses.

PyTorch's dispatcher tells devices apart, but two backends serve CUDA tensors and one serves all,
what a build contains decides between them, and a call may name one. So each op is registered once,
for every device (ops/_library.py), and asks `select` here. A call on plain CPU or CUDA tensors that
`select` gives to the native kernels goes past the dispatcher (ops/_direct.py).

A device of another package gets its kernels in one of two ways. `register_backend` adds a backend
that can be named, is listed by `available_backends` and runs by default on its device. Or
`torch.library.impl("taylor_kernels::filter_moments", "PrivateUse1")` takes one op over at a
dispatch key, which PyTorch prefers to what stands here. Until then the reference runs there.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch

from taylor_kernels.backends import native, reference

#: A module or an object that has each op as a function, by its name. They take what those of
#: reference.py take, and write into the outputs they are given.
Kernels = Any


def _nowhere(device_type: str) -> bool:
    return False


class Backend(NamedTuple):
    """A name for `backend=`, and the kernels behind it."""

    name: str
    devices: tuple[str, ...]  # types of `torch.device` that it serves; none: all of them
    status: Callable[[], tuple[bool, str]]  # whether it can run, and its version or why it cannot
    kernels: Callable[[], Kernels]  # imports them, when they are first needed
    float64: bool = False
    on_request: Callable[[str], bool] = _nowhere  # other devices, only where a call names it
    #: The status on one device, where devices of a type differ.
    status_on: Callable[[torch.device], tuple[bool, str]] | None = None


class Availability(NamedTuple):
    """Whether a backend can run here, and the version or the reason why not."""

    ok: bool
    detail: str

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return f"available ({self.detail})" if self.ok else f"not available: {self.detail}"


class Route(NamedTuple):
    """Where another backend than the device's first one is the default for an op."""

    op: str
    capability: tuple[int, int]  # of the GPU
    dtypes: frozenset[torch.dtype]
    backend: str
    why: str


#: The first that fits a call, and can run, takes it from "cuda". Measure before adding one.
ROUTES = (
    Route(
        "conv2d_fisher",
        (9, 0),
        frozenset((torch.float16, torch.bfloat16)),
        "triton",
        "not measured yet: this was set when the CUDA kernels were held under Triton's 350 TFLOP/s "
        "by the instructions that they issue. By count of machine code, loads not counted, "
        "mma.sync itself holds them now, at 593, but neither has run. Triton's compile at the "
        "first call of a layer, in half a second; backend='cuda' does not",
    ),
)


def available_backends() -> dict[str, Availability]:
    """Every backend by name: true if it can run here, else its text says why not.

    Example:
        >>> import taylor_kernels as tk
        >>> list(tk.available_backends())
        ['cuda', 'triton', 'cpu', 'reference']
        >>> bool(tk.available_backends()["reference"])
        True
    """
    return {name: _availability(backend) for name, backend in _backends.items()}


def register_backend(backend: Backend) -> None:
    """Add a backend: `backend=` takes its name, and its devices run on it by default.

    Where several serve a device, the first that was registered and can run is the default.

    Raises:
        TypeError: it is no `Backend`, or not made of what one is made of.
        ValueError: there is a backend of that name.
    """
    if not isinstance(backend, Backend):
        raise TypeError(f"backend: expected a Backend, got {type(backend).__name__}")
    if not isinstance(backend.name, str) or not backend.name:
        raise TypeError(f"backend: its name is {backend.name!r}; give it a string that names it")
    devices = backend.devices
    if not isinstance(devices, tuple) or not all(isinstance(each, str) for each in devices):
        raise TypeError(
            f"backend: the devices of {backend.name!r} are {devices!r}; give a tuple of types of "
            "torch.device, such as ('cpu',)"
        )
    for field in ("status", "kernels", "on_request"):
        if not callable(getattr(backend, field)):
            raise TypeError(f"backend: {field} of {backend.name!r} is no function; give it one")
    if backend.name in _backends:
        raise ValueError(f"backend: there is one named {backend.name!r}; choose another name")
    _backends[backend.name] = backend


def select(device: torch.device, dtype: torch.dtype, backend: str | None) -> Kernels:
    """The kernels that run an op on tensors of this device and dtype.

    Default: CUDA tensors go to the native kernels if they were built, else to Triton; CPU tensors
    to the native kernels, else to the reference. float64 on a GPU goes to the reference, as do
    devices that no backend serves. ROUTES has the exceptions of single ops.

    Raises:
        ValueError: `backend` is no backend's name, or cannot run on this device or dtype.
        RuntimeError: the named backend is not available here; the message says why.
    """
    return _chosen(device, dtype, backend).kernels()


def kernel(
    op: str, device: torch.device, dtype: torch.dtype, backend: str | None
) -> Callable[..., None]:
    """The kernel of one op, of those that `select` gives or ROUTES.

    Raises:
        ValueError, RuntimeError: as `select`; or the backend has not got the op.
    """
    chosen = _chosen_for(op, device, dtype, backend)
    kernels = chosen.kernels()
    try:
        return getattr(kernels, op)
    except AttributeError as error:
        raise RuntimeError(
            f"backend: {chosen.name!r} has no {op}; name another, such as backend='reference'"
        ) from error


def runs_natively(op: str, device: torch.device, dtype: torch.dtype, backend: str | None) -> bool:
    """Whether the kernel that `kernel` gives is one of csrc/; raises what it raises."""
    return _chosen_for(op, device, dtype, backend).kernels() is native


def default_backend(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that runs an op where the call names none."""
    return _chosen_for(op, device, dtype, None).name


def _chosen_for(op: str, device: torch.device, dtype: torch.dtype, backend: str | None) -> Backend:
    chosen = _chosen(device, dtype, backend)
    if backend is None and chosen.name == "cuda":
        return _routed(op, device, dtype) or chosen
    return chosen


def _chosen(device: torch.device, dtype: torch.dtype, backend: str | None) -> Backend:
    wide = dtype == torch.float64
    if backend is None:
        kind = device.type
        for each in _backends.values():
            serves = kind in each.devices and (each.float64 or not wide)
            if serves and _status(each, device)[0]:
                return each
        return _backends["reference"]
    check_name(backend)
    named = _backends[backend]
    if named.devices and device.type not in named.devices and not named.on_request(device.type):
        raise ValueError(
            f"backend: {backend!r} does not run on {device.type} tensors; "
            "leave backend=None to let the device decide"
        )
    if wide and not named.float64:
        raise ValueError(f"backend: {backend!r} has no float64; use 'reference'")
    status = _availability(named, device)
    if not status:
        raise RuntimeError(f"backend: {backend!r} is {status}")
    return named


def _routed(op: str, device: torch.device, dtype: torch.dtype) -> Backend | None:
    for route in ROUTES:
        if route.op == op and dtype in route.dtypes:
            capability = torch.cuda.get_device_capability(device)
            other = _backends[route.backend]
            if capability == route.capability and _availability(other, device):
                return other
    return None


def _availability(backend: Backend, device: torch.device | None = None) -> Availability:
    """Its status, in general or on one device."""
    return Availability(*_status(backend, device))


def _status(backend: Backend, device: torch.device | None) -> tuple[bool, str]:
    """The same without a name, for calls. One that fails keeps no other from running."""
    try:
        if device is None or backend.status_on is None:
            ok, detail = backend.status()
        else:
            ok, detail = backend.status_on(device)
    except Exception as error:
        return False, f"status raised {type(error).__name__}: {error}"
    return ok, detail


def check_name(backend: object) -> None:
    """A backend's name or None, or an error."""
    if backend is None or (isinstance(backend, str) and backend in _backends):
        return
    error = ValueError if isinstance(backend, str) else TypeError
    raise error(f"backend: {backend!r} is not one of {', '.join(_backends)}")


def _triton_kernels() -> Kernels:
    from taylor_kernels.backends import triton

    return triton


def _triton_status() -> tuple[bool, str]:
    triton = _find_triton()
    if triton is None:
        return False, "Triton is not installed; pip install triton"
    if triton.knobs.runtime.interpret:
        return True, f"Triton {triton.__version__}, in its interpreter"
    if not torch.cuda.is_available():
        return False, f"Triton {triton.__version__} is installed, but PyTorch sees no GPU"
    return True, f"Triton {triton.__version__}"


def _interprets(device_type: str) -> bool:
    """Triton's interpreter takes CPU tensors, too slowly to be their default."""
    triton = _find_triton() if device_type == "cpu" else None
    return triton is not None and bool(triton.knobs.runtime.interpret)


def _find_triton() -> Any:
    """The package, whose import takes a second, or None."""
    try:
        return import_module("triton")
    except ImportError:
        return None


#: By name. Of those that serve a device, the first is its default.
_backends = {
    backend.name: backend
    for backend in (
        Backend(
            "cuda",
            ("cuda",),
            native.cuda_status,
            lambda: native,
            status_on=native.cuda_status_on,
        ),
        Backend("triton", ("cuda",), _triton_status, _triton_kernels, on_request=_interprets),
        Backend("cpu", ("cpu",), native.cpu_status, lambda: native, float64=True),
        Backend(
            "reference",
            (),
            lambda: (True, f"PyTorch {torch.__version__}"),
            lambda: reference,
            float64=True,
        ),
    )
}


class _Package(ModuleType):
    """This package, which can still be called as `tk.backends()` once was."""

    def __call__(self) -> dict[str, Availability]:
        warnings.warn(
            "tk.backends() is now tk.available_backends()", DeprecationWarning, stacklevel=2
        )
        return available_backends()


sys.modules[__name__].__class__ = _Package

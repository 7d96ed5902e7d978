"""Which implementation of an op runs: `cuda` and `cpu` are the native ones, beside `triton` and
`reference`. `available()` says what this machine has; `select()` picks, or says why it cannot.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from taylor_kernels.backends import native, reference

NAMES = ("cuda", "triton", "cpu", "reference")


class Availability(NamedTuple):
    """Whether a backend can run here, and the version or the reason why not."""

    ok: bool
    detail: str

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return f"available ({self.detail})" if self.ok else f"not available: {self.detail}"


def available() -> dict[str, Availability]:
    """Every backend by name, with its `Availability`: true, or false with the reason."""
    return {
        "cuda": Availability(*native.cuda_status()),
        "triton": Availability(*_triton_status()),
        "cpu": Availability(*native.cpu_status()),
        "reference": Availability(True, f"PyTorch {torch.__version__}"),
    }


def select(device: torch.device, dtype: torch.dtype, backend: str | None) -> ModuleType:
    """The module that runs an op on tensors of this device and dtype.

    Default: CUDA tensors go to the native kernels if they were built, else to Triton; CPU tensors
    to the native kernels, else to the reference. float64 on a GPU goes to the reference.

    Raises:
        ValueError: `backend` is no backend's name, or cannot run on this device or dtype.
        RuntimeError: the named backend is not available here; the message says why.
    """
    if backend is None:
        return _default(device, dtype)
    check_name(backend)
    if backend == "reference":
        return reference
    interpreted = backend == "triton" and device.type == "cpu" and _interpreting()
    if device.type != ("cpu" if backend == "cpu" else "cuda") and not interpreted:
        raise ValueError(
            f"backend: {backend!r} does not run on {device.type} tensors; "
            "leave backend=None to let the device decide"
        )
    if dtype == torch.float64 and backend != "cpu":
        raise ValueError(f"backend: {backend!r} has no float64; use 'reference'")
    status = available()[backend]
    if not status and not interpreted:
        raise RuntimeError(f"backend: {backend!r} is {status}")
    return _triton() if backend == "triton" else native


def check_name(backend: object) -> None:
    """A backend's name or None, or an error."""
    if backend is None or (isinstance(backend, str) and backend in NAMES):
        return
    error = ValueError if isinstance(backend, str) else TypeError
    raise error(f"backend: {backend!r} is not one of {', '.join(NAMES)}")


def _default(device: torch.device, dtype: torch.dtype) -> ModuleType:
    if device.type == "cpu":
        return native if native.cpu_status()[0] else reference
    if device.type != "cuda" or dtype == torch.float64:
        return reference
    if native.cuda_status()[0]:
        return native
    return _triton() if _triton_status()[0] else reference


def _triton() -> ModuleType:
    from taylor_kernels.backends import triton as triton_backend  # importing Triton takes a second

    return triton_backend


def _interpreting() -> bool:
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def _triton_status() -> tuple[bool, str]:
    try:
        import triton
    except ImportError:
        return False, "Triton is not installed; pip install triton"
    if not torch.cuda.is_available():
        return False, f"Triton {triton.__version__} is installed, but PyTorch sees no GPU"
    return True, f"Triton {triton.__version__}"

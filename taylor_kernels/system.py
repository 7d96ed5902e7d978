"""What this machine and this build have: versions, devices, backends."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from taylor_kernels.backends import available_backends, native

_PACKAGES = ("taylor-kernels", "torch", "triton", "torch-pruning", "numpy")


def package_versions(*names: str) -> dict[str, str]:
    """Installed versions by distribution name; "not installed" for what is not there."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def cpu_model() -> str:
    """The CPU's name where the system tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.partition(":") for line in file]
        names = [value.strip() for key, _, value in lines if key.strip() == "model name"]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def describe() -> dict[str, dict[str, Any]]:
    """Sections of facts: versions, CPU, GPUs, backends ({"available", "detail"} each)."""
    gpus = {f"cuda:{i}": _gpu(i) for i in range(torch.cuda.device_count())}
    return {
        "versions": {
            **package_versions(*_PACKAGES),
            "python": platform.python_version(),
            "built with": _build(),
            "torch's CUDA": torch.version.cuda or "none (CPU build)",
        },
        "cpu": {
            "model": cpu_model(),
            "torch uses": torch.backends.cpu.get_cpu_capability(),
            "kernels use": native._native.cpu_isa() if native._native else "not built",
            "threads": torch.get_num_threads(),
        },
        "gpus": gpus or {"none": "PyTorch sees no GPU"},
        "backends": {
            name: {"available": bool(status), "detail": str(status)}
            for name, status in available_backends().items()
        },
    }


def _build() -> str:
    if native._native is None:
        return "the native module is not built"
    cuda = native._native.cuda_version
    return f"{native._native.compiler}, " + (
        f"CUDA {cuda} for {native._native.cuda_architectures}" if cuda else "no CUDA"
    )


def _gpu(number: int) -> str:
    properties = torch.cuda.get_device_properties(number)
    return (
        f"{properties.name}, sm_{properties.major}{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB"
    )

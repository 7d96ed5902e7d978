"""Our own backends as providers: what a user gets, Triton beside CUDA, lower instruction sets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch

import taylor_kernels as tk
from bench.harness import Provider
from taylor_kernels.backends import default_backend
from taylor_kernels.backends.native import _native

ISAS = ("avx512", "avx2", "neon", "baseline")
_ON_GPU = ("ours (triton)", "ours (cuda)")
#: Labels of what ours_by() makes, where this machine has it all.
OURS = ("ours", *_ON_GPU, *(f"ours ({isa})" for isa in ISAS))


def our_backends(
    device: torch.device, op: str = "filter_moments", dtype: torch.dtype = torch.float32
) -> dict[str, str | None]:
    """`backend=` by label: None is the one that a user gets, beside it the other one on a GPU."""
    available = tk.available_backends()
    if device.type != "cuda" or not (available["cuda"] and available["triton"]):
        return {"ours": None}
    other = "triton" if default_backend(op, device, dtype) == "cuda" else "cuda"
    return {"ours": None, f"ours ({other})": other}


def ours_by(
    run: Callable[[str | None], Callable[[], Any]],
    check: Callable[[Any], float],
    device: torch.device,
) -> list[Provider]:
    """A provider for each, of run(backend); of the CPU kernels, one for each lower set too."""
    roles: dict[str, Literal["ours", "extra"]] = {"ours": "ours"}
    found = [
        Provider(label, run(backend), check, roles.get(label, "extra"), label)
        for label, backend in our_backends(device).items()
    ]
    if device.type == "cpu" and _native is not None:
        for isa in _native.cpu_isas():
            if isa != _native.cpu_isa():
                label, lower = f"ours ({isa})", partial(on_isa, isa, run(None))
                found.append(Provider(label, lower, check, "extra", label))
    return found


def on_isa(isa: str, run: Callable[[], Any]) -> Any:
    """run() with the CPU kernels of an instruction set."""
    before = _native.cpu_isa()
    _native.set_cpu_isa(isa)
    try:
        return run()
    finally:
        _native.set_cpu_isa(before)


def isa_of(label: str) -> str | None:
    """The instruction set whose CPU kernels a provider of OURS runs, or None."""
    if _native is None or label not in OURS or label in _ON_GPU:
        return None
    return _native.cpu_isa() if label == "ours" else label.removeprefix("ours (").rstrip(")")


def why_missing(label: str) -> str:
    """Why a provider is in no results of this machine."""
    isa = isa_of(label)
    if isa is None or _native is None:
        return "not available on this device"
    return f"it is `ours` here: {isa}" if isa == _native.cpu_isa() else f"this machine has no {isa}"

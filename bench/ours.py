"""This package's own backends as providers: what a user gets, and Triton beside CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

import taylor_kernels as tk
from bench.harness import Provider
from taylor_kernels.backends import default_backend


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
    """A provider for each, of run(backend)."""
    roles: dict[str, Literal["ours", "extra"]] = {"ours": "ours"}
    return [
        Provider(label, run(backend), check, roles.get(label, "extra"))
        for label, backend in our_backends(device).items()
    ]

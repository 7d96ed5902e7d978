"""This package's own backends as providers: what a user gets, and Triton beside CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

import taylor_kernels as tk
from bench.harness import Provider


def our_backends(device: torch.device) -> dict[str, str | None]:
    """`backend=` by label: None is the one that a user gets."""
    available = tk.available_backends()
    both = device.type == "cuda" and available["cuda"] and available["triton"]
    return {"ours": None, **({"ours (triton)": "triton"} if both else {})}


def ours_by(
    run: Callable[[str | None], Callable[[], Any]],
    check: Callable[[Any], float],
    device: torch.device,
) -> list[Provider]:
    """A provider for each, of run(backend)."""
    roles: dict[str, Literal["ours", "extra"]] = {"ours": "ours", "ours (triton)": "extra"}
    return [
        Provider(label, run(backend), check, roles[label])
        for label, backend in our_backends(device).items()
    ]

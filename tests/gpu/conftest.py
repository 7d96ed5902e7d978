"""Fixtures of the tests on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import taylor_kernels as tk


@pytest.fixture(params=("cuda", "triton"))
def backend(request: pytest.FixtureRequest) -> str:
    status = tk.available_backends()[request.param]
    if not status and request.param == "cuda" and os.environ.get("TAYLOR_KERNELS_CUDA") == "on":
        pytest.fail(f"backend 'cuda' is asked for, but {status}")  # as by gpu-check
    if not status:
        pytest.skip(str(status))
    return request.param


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors start as NaN, so an output or a partial sum that nothing wrote shows."""
    for owner, name in ((torch, "empty"), (Tensor, "new_empty")):
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, _filling(make))


def _filling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def filled(*args: object, **kwargs: object) -> Tensor:
        tensor = make(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 255)

    return filled

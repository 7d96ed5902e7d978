"""What the Triton kernels on CPU tensors need, and what makes them quicker there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors start as NaN, so an output or a partial sum that nothing wrote shows."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def fill(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))


@pytest.fixture(autouse=True)
def _patched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton makes its language interpret anew whenever one function calls another, which takes a
    third of the time: once for each function of a launch is enough."""
    from triton.runtime import interpreter

    patched = set()
    run = interpreter.InterpretedFunction.run

    def launch(function, *arguments, **keywords):
        patched.clear()
        return run(function, *arguments, **keywords)

    def call(function, *arguments, **keywords):
        if function not in patched:
            patched.add(function)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*arguments, **keywords)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", launch)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)

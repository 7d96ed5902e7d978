"""Which backend runs, and what is said about those that cannot."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
import torch

import taylor_kernels as tk
from taylor_kernels.backends import native, reference, select

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_every_backend_is_available_or_says_why_not():
    status = tk.available_backends()
    assert list(status) == ["cuda", "triton", "cpu", "reference"]
    assert status["cpu"], status["cpu"]
    assert status["reference"]
    for backend in status.values():
        assert str(backend).startswith("available (" if backend else "not available: ")
        assert backend.detail
    if not torch.cuda.is_available():
        assert not status["cuda"]
        assert not status["triton"]
        assert "GPU" in status["triton"].detail


@pytest.mark.parametrize(
    ("native_cpu", "native_cuda", "triton", "device", "dtype", "expected"),
    [
        (True, False, False, CPU, torch.float32, "native"),
        (True, False, False, CPU, torch.float64, "native"),
        (False, False, False, CPU, torch.float32, "reference"),
        (True, True, True, CUDA, torch.float32, "native"),
        (True, False, True, CUDA, torch.bfloat16, "triton"),
        (True, False, False, CUDA, torch.float32, "reference"),
        (True, True, True, CUDA, torch.float64, "reference"),
    ],
)
def test_default_dispatch(
    native_cpu, native_cuda, triton, device, dtype, expected, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(native, "cpu_status", lambda: (native_cpu, ""))
    monkeypatch.setattr(native, "cuda_status", lambda: (native_cuda, ""))
    module = sys.modules[select.__module__]  # tk.backends is the function of that name
    monkeypatch.setattr(module, "_triton_status", lambda: (triton, ""))
    monkeypatch.setattr(module, "_triton", lambda: ModuleType("triton"))
    assert select(device, dtype, None).__name__.rsplit(".", 1)[-1] == expected


def test_a_named_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "cuda_status", lambda: (False, "built without CUDA; rebuild"))
    with pytest.raises(RuntimeError, match="'cuda' is not available: built without CUDA; rebuild"):
        select(CUDA, torch.float32, "cuda")
    with pytest.raises(ValueError, match="'cpu' does not run on cuda tensors"):
        select(CUDA, torch.float32, "cpu")
    with pytest.raises(ValueError, match="'cuda' has no float64"):
        select(CUDA, torch.float64, "cuda")
    assert select(CUDA, torch.float64, "reference") is reference


def test_without_the_native_module_the_reference_takes_over():
    script = """
import sys
from types import ModuleType
sys.modules["taylor_kernels._native"] = None
import torch, taylor_kernels as tk
status = tk.available_backends()
assert not status["cpu"] and not status["cuda"], status
assert "pip install" in status["cpu"].detail
w, g = torch.randn(2, 4, 6)
assert tk.filter_moments(w, g).shape == (4, 5)
try:
    tk.filter_moments(w, g, backend="cpu")
except RuntimeError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "backend: 'cpu' is not available: taylor_kernels._native did not load" in run.stdout


def test_importing_the_package_is_light():
    script = (
        "import sys, taylor_kernels\n"
        "heavy = {'triton', 'torch_pruning', 'matplotlib', 'sklearn', 'torch._inductor'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "op",
    [
        lambda: tk.filter_moments(torch.ones(0, 3), torch.ones(0, 3), backend="cuda"),
        lambda: tk.second_order_moments(*[torch.ones(0, 3)] * 3, backend="cuda"),
        lambda: tk.hutchinson_moments(*[torch.ones(0, 3)] * 2, seed=0, backend="cuda"),
        lambda: tk.rademacher_like(torch.ones(0, 3), seed=0, backend="cuda"),
        lambda: tk.gate_gradients(torch.ones(0, 3), torch.ones(0, 3), backend="cuda"),
        lambda: tk.linear_fisher(torch.ones(0, 3), torch.ones(0, 3), backend="cuda"),
    ],
)
def test_empty_tensors_do_not_hide_a_backend_that_cannot_run(op):
    with pytest.raises(ValueError, match="'cuda' does not run on cpu tensors"):
        op()

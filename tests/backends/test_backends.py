"""Which backend runs, and what is said about those that cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import taylor_kernels as tk
from taylor_kernels import backends
from taylor_kernels.backends import Backend, reference, register_backend, select
from tests.helpers.programs import run_program

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
    for name, ok in {"cpu": native_cpu, "cuda": native_cuda, "triton": triton}.items():
        kernels = "triton" if name == "triton" else "native"
        changed = backends._backends[name]._replace(
            status=lambda ok=ok: (ok, ""), kernels=lambda kernels=kernels: kernels, status_on=None
        )
        monkeypatch.setitem(backends._backends, name, changed)
    chosen = select(device, dtype, None)
    assert ("reference" if chosen is reference else chosen) == expected


def test_a_named_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch):
    missing = backends._backends["cuda"]._replace(
        status_on=lambda device: (False, "built without CUDA; rebuild")
    )
    monkeypatch.setitem(backends._backends, "cuda", missing)
    with pytest.raises(RuntimeError, match="'cuda' is not available: built without CUDA; rebuild"):
        select(CUDA, torch.float32, "cuda")
    with pytest.raises(ValueError, match="'cpu' does not run on cuda tensors"):
        select(CUDA, torch.float32, "cpu")
    with pytest.raises(ValueError, match="'cuda' has no float64"):
        select(CUDA, torch.float64, "cuda")
    assert select(CUDA, torch.float64, "reference") is reference


def run_script(script: str) -> str:
    """What a process of its own prints."""
    run = run_program(script)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_without_the_native_module_the_reference_takes_over():
    printed = run_script("""
import sys
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
""")
    assert "backend: 'cpu' is not available: taylor_kernels._native did not load" in printed


def test_importing_the_package_is_light():
    printed = run_script(
        "import sys, taylor_kernels\n"
        "heavy = {'triton', 'torch_pruning', 'matplotlib', 'sklearn', 'torch._inductor'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert printed.strip() == "[]"


def test_naming_another_backend_does_not_import_triton():
    printed = run_script("""
import sys, torch, taylor_kernels as tk
from taylor_kernels.backends import select
for device, backend in (("cpu", "cpu"), ("cpu", "reference"), ("cpu", None), ("cuda", "cuda")):
    try:
        select(torch.device(device), torch.float32, backend)
    except RuntimeError as error:
        assert "'cuda' is not available" in str(error)
print("triton" in sys.modules)
""")
    assert printed.strip() == "False"


def test_backends_is_a_package_that_can_still_be_called():
    import taylor_kernels.backends

    assert taylor_kernels.backends is tk.backends is backends
    with pytest.warns(DeprecationWarning, match=r"tk.backends\(\) is now tk.available_backends"):
        assert tk.backends() == tk.available_backends()


class Recording:
    """The reference, with a note of what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, op: str) -> Callable[..., Any]:
        self.asked.append(op)
        return getattr(reference, op)


def test_a_backend_from_outside_can_be_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "_backends", dict(backends._backends))
    kernels, w = Recording(), torch.randn(4, 6)
    register_backend(Backend("made_up", ("cpu",), lambda: (True, "1.0"), lambda: kernels))
    assert str(tk.available_backends()["made_up"]) == "available (1.0)"
    calls = {
        "filter_moments": lambda backend: tk.filter_moments(w, w, backend=backend),
        "second_order_moments": lambda backend: tk.second_order_moments(w, w, w, backend=backend),
        "hutchinson_moments": lambda backend: tk.hutchinson_moments(w, w, seed=3, backend=backend),
        "rademacher": lambda backend: tk.rademacher_like(w, seed=3, backend=backend),
        "gate_gradients": lambda backend: tk.gate_gradients(w, w, backend=backend),
        "conv2d_fisher": lambda backend: tk.linear_fisher(w, w, backend=backend),
        "conv2d_example_norms": lambda backend: tk.linear_example_norms(w, w, backend=backend),
    }
    for call in calls.values():
        assert call("made_up").equal(call("reference"))
        call(None)  # who was there first stays the default
    assert kernels.asked == list(calls)
    with pytest.raises(ValueError, match="'made_up' has no float64; use 'reference'"):
        tk.filter_moments(w.double(), w.double(), backend="made_up")
    with pytest.raises(ValueError, match=r"'gone' is not one of cuda, .*, reference, made_up"):
        tk.filter_moments(w, w, backend="gone")
    with pytest.raises(ValueError, match="there is one named 'made_up'"):
        register_backend(backends._backends["made_up"])


def right() -> tuple[bool, str]:
    return True, "1.0"


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("cpu", "backend: expected a Backend, got str"),
        (Backend("", ("cpu",), right, dict), "its name is ''; give it a string"),
        (Backend(3, ("cpu",), right, dict), "its name is 3; give it a string"),
        (Backend("odd", "cpu", right, dict), "the devices of 'odd' are 'cpu'; give a tuple"),
        (Backend("odd", (3,), right, dict), r"the devices of 'odd' are \(3,\); give a tuple"),
        (Backend("odd", ("cpu",), True, dict), "status of 'odd' is no function"),
        (Backend("odd", ("cpu",), right, reference), "kernels of 'odd' is no function"),
    ],
)
def test_what_is_no_backend(backend: Any, message: str):
    before = list(backends._backends)
    with pytest.raises(TypeError, match=message):
        register_backend(backend)
    assert list(backends._backends) == before


@pytest.mark.parametrize("returned", [None, OSError("no such driver")])
def test_a_status_that_fails_is_that_backends_alone(monkeypatch: pytest.MonkeyPatch, returned: Any):
    def status() -> Any:
        if returned is not None:
            raise returned

    monkeypatch.setattr(backends, "_backends", dict(backends._backends))
    register_backend(Backend("broken", ("cpu", "odd"), status, lambda: reference))
    found = tk.available_backends()
    assert found["reference"]
    assert not found["broken"]
    assert str(found["broken"]).startswith("not available: status raised ")
    assert returned is None or found["broken"].detail.endswith("OSError: no such driver")
    w = torch.randn(4, 6)
    assert tk.filter_moments(w, w).shape == (4, 5)
    with pytest.raises(RuntimeError, match="'broken' is not available: status raised"):
        tk.filter_moments(w, w, backend="broken")


def test_a_backend_without_an_op_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "_backends", dict(backends._backends))
    register_backend(Backend("bare", ("cpu",), right, object))
    w = torch.randn(4, 6)
    calls = {
        "filter_moments": lambda: tk.filter_moments(w, w, backend="bare"),
        "rademacher": lambda: tk.rademacher_like(w, seed=3, backend="bare"),
        "gate_gradients": lambda: tk.gate_gradients(w, w, backend="bare"),
        "conv2d_fisher": lambda: tk.linear_fisher(w, w, backend="bare"),
        "conv2d_example_norms": lambda: tk.linear_example_norms(w, w, backend="bare"),
    }
    for op, call in calls.items():
        with pytest.raises(RuntimeError, match=f"backend: 'bare' has no {op}; name another"):
            call()


def test_new_tensors_in_a_capture_are_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    from taylor_kernels.backends.triton.tables import device_table

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"call the op on them once before, or use .*'cuda'"):
        device_table([1, 2, 3], CUDA)


def test_a_device_from_outside_brings_its_kernels():
    """By a backend, then by taking an op over at its dispatch key."""
    pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch cannot make a device up in Python")
    printed = run_script("""
import torch
from torch.utils import backend_registration
backend_registration._setup_privateuseone_for_python_backend("toy")
import taylor_kernels as tk
from taylor_kernels.backends import Backend, reference, register_backend, select

def empty(size, dtype=torch.float32, **_):
    return torch._C._acc.create_empty_tensor(size, dtype)

torch.library.impl("aten::empty.memory_format", "PrivateUse1")(empty)
w, g = empty((4, 6)), empty((4, 6))
assert select(w.device, w.dtype, None) is reference

class Kernels:
    def filter_moments(self, items):
        print("backend", items[0].weight.device, items[0].row_out.device)

register_backend(Backend("toy", ("toy",), lambda: (True, "made up"), Kernels))
assert tk.filter_moments(w, g).shape == (4, 5)
ones = lambda *_: (torch.ones(4, 5), torch.ones(0, 5))
torch.library.impl("taylor_kernels::filter_moments", "PrivateUse1")(ones)
print("key", tk.filter_moments(w, g).sum().item())
""")
    assert printed.split("\n") == ["backend toy:0 toy:0", "key 20.0", ""]


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

"""What the CUDA code asks of the runtime, on an emulated one, and what follows for the backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch

import taylor_kernels as tk
from taylor_kernels import backends
from taylor_kernels.backends import native, reference, select
from taylor_kernels.layout import conv2d_fisher_args
from taylor_kernels.ops._direct import one_output
from tests.helpers import emulated
from tests.helpers.cases import MomentsCase, random_like_case, same_bits
from tests.helpers.fisher_cases import FisherCase, random_fisher_inputs
from tests.helpers.programs import run_program

#: Errors of cudaFuncGetAttributes and what they mean for the user.
PROBLEMS = {
    98: "compiled for other GPUs",  # cudaErrorInvalidDeviceFunction
    209: "compiled for other GPUs",  # cudaErrorNoKernelImageForDevice
    35: "the driver is too old",  # cudaErrorInsufficientDriver
    222: "the driver is too old",  # cudaErrorUnsupportedPtxVersion
    2: "an emulated error",  # any other, in the runtime's own words
}


@pytest.fixture
def kernels() -> Iterator[ModuleType]:
    module = emulated.kernels()
    yield module
    module.set_function_error(0)
    module.set_ptx_version(90)
    module.set_device(0)


@pytest.mark.parametrize("error", PROBLEMS)
def test_a_gpu_that_cannot_run_the_kernels(kernels: ModuleType, error: int) -> None:
    kernels.set_function_error(error)
    assert PROBLEMS[error] in kernels.cuda_device_problem()
    assert kernels.take_last_error() == 0, "the next launch would report it"


def test_a_gpu_that_runs_them(kernels: ModuleType) -> None:
    assert kernels.cuda_device_problem() == ""


class GPUs:
    """Three, as PyTorch and the native module see them; the second is the current one."""

    def __init__(self) -> None:
        self.capabilities = [(8, 0), (9, 0), (9, 0)]
        self.problems = ["", "", ""]
        self.current = 1
        self.asked: list[int] = []

    def device(self, number: int) -> nullcontext[None]:
        self.current = number
        return nullcontext()

    def problem(self) -> str:
        self.asked.append(self.current)
        return self.problems[self.current]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> GPUs:
    found = GPUs()
    module = SimpleNamespace(
        cuda_version="12.6",
        cuda_architectures="sm_80 sm_90 compute_90",
        cuda_device_problem=found.problem,
    )
    monkeypatch.setattr(native, "_native", module)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 3,
        "current_device": lambda: found.current,
        "device": found.device,
        "get_device_capability": lambda gpu: found.capabilities[getattr(gpu, "index", gpu)],
        "get_device_name": lambda number: f"GPU {number}",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(native, "_lasting", {})
    return found


def test_status_says_what_the_kernels_are_built_for(gpus: GPUs) -> None:
    assert native.cuda_status() == (True, "CUDA 12.6, sm_80 sm_90 compute_90")


def test_status_asks_one_gpu_of_each_capability(gpus: GPUs) -> None:
    """The current one if it is one of them: the others may belong to other processes."""
    native.cuda_status()
    native.cuda_status()
    assert gpus.asked == [1, 0]


OTHER = "they are compiled for other GPUs (no kernel image)"


@pytest.mark.parametrize("number", [0, 1])
def test_a_gpu_that_cannot_run_them_is_named_and_keeps_no_other(gpus: GPUs, number: int) -> None:
    gpus.problems[number] = OTHER
    usable, detail = native.cuda_status()
    assert usable
    assert detail.startswith("CUDA 12.6, sm_80 sm_90 compute_90; ")
    assert f"do not run on cuda:{number} (GPU {number}): {OTHER}" in detail
    for other in range(3):
        usable, detail = native.cuda_status_on(torch.device("cuda", other))
        assert usable == (other != number), detail


def test_status_if_no_gpu_can_run_them(gpus: GPUs) -> None:
    gpus.problems = [OTHER] * 3
    usable, why = native.cuda_status()
    assert not usable
    assert why.startswith("built for CUDA 12.6, sm_80 sm_90 compute_90, but the kernels do not run")
    assert "cuda:1 (GPU 1)" in why
    assert "cuda:0 (GPU 0)" in why


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize(
    ("problem", "asked"),
    [("", [1]), (OTHER, [1]), ("the driver is too old for them", [1]), ("out of memory", [1, 1])],
)
def test_an_error_that_may_pass_is_asked_about_again(
    gpus: GPUs, device: str, problem: str, asked: list[int]
) -> None:
    gpus.problems[1] = problem
    for _ in range(2):
        assert native.cuda_status_on(torch.device(device))[0] == (not problem)
    assert gpus.asked == asked
    gpus.problems[1] = ""
    assert native.cuda_status_on(torch.device(device))[0] == (problem in ("", "out of memory"))


def test_the_device_of_a_tensor_decides(gpus: GPUs, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.problems[0] = OTHER
    triton = backends._backends["triton"]._replace(status=lambda: (False, "not installed"))
    monkeypatch.setitem(backends._backends, "triton", triton)
    chosen = [select(torch.device("cuda", n), torch.float32, None) for n in range(3)]
    assert chosen == [reference, native, native]
    with pytest.raises(
        RuntimeError, match=r"'cuda' is not available: .*cuda:0 \(GPU 0\): they are"
    ):
        select(torch.device("cuda", 0), torch.float32, "cuda")


@pytest.fixture
def two_backends(gpus: GPUs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native kernels and Triton's, on an A100 and two H100s."""
    ops = ("conv2d_fisher", "filter_moments", "gate_gradients")
    for name in ("cuda", "triton"):
        kernels = SimpleNamespace(**{op: f"{op} by {name}" for op in ops})
        there = backends._backends[name]._replace(kernels=lambda kernels=kernels: kernels)
        if name == "triton":
            there = there._replace(status=lambda: (True, "Triton"))
        monkeypatch.setitem(backends._backends, name, there)


@pytest.mark.usefixtures("two_backends")
def test_an_op_goes_where_its_route_leads(gpus: GPUs, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [torch.device("cuda", i) for i in range(3)]

    def by(op: str, dtype: torch.dtype, backend: str | None = None) -> list[str]:
        found = [str(backends.kernel(op, device, dtype, backend)) for device in devices]
        assert all(kernel.startswith(f"{op} by ") for kernel in found)
        names = [kernel.rpartition(" ")[2] for kernel in found]
        if backend is None:
            assert [backends.default_backend(op, each, dtype) for each in devices] == names
        return names

    for dtype in (torch.float16, torch.bfloat16):
        assert by("conv2d_fisher", dtype) == ["cuda", "triton", "triton"]
        assert by("filter_moments", dtype) == ["cuda"] * 3
        assert by("conv2d_fisher", dtype, "cuda") == ["cuda"] * 3, "what is named is taken"
    assert by("conv2d_fisher", torch.float32) == ["cuda"] * 3
    gpus.capabilities = [(9, 0), (10, 0), (12, 0)]
    assert by("conv2d_fisher", torch.float16) == ["triton", "cuda", "cuda"]
    missing = backends._backends["triton"]._replace(status=lambda: (False, "not installed"))
    monkeypatch.setitem(backends._backends, "triton", missing)
    assert by("conv2d_fisher", torch.float16) == ["cuda"] * 3


@pytest.mark.usefixtures("two_backends")
def test_a_planned_call_goes_where_its_route_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls on plain tensors, which pass PyTorch's dispatcher by, do not pass the routes by."""
    cuda = backends._backends["cuda"]._replace(kernels=lambda: native)
    monkeypatch.setitem(backends._backends, "cuda", cuda)
    h100, half = 1, torch.empty(1, dtype=torch.float16)
    planned = (None, True, h100, False, (1,))
    assert one_output("conv2d_fisher", planned, half, None) is None
    for op, like, backend, index in (
        ("conv2d_fisher", half, "cuda", h100),
        ("conv2d_fisher", half.float(), None, h100),
        ("conv2d_fisher", half, None, 0),
        ("gate_gradients", half, None, h100),
    ):
        assert backends.runs_natively(op, torch.device("cuda", index), like.dtype, backend), op


def test_routes_lead_somewhere() -> None:
    for route in backends.ROUTES:
        assert hasattr(reference, route.op)
        assert route.backend in tuple(tk.available_backends())
        assert route.why


#: Their launches need different amounts of shared memory, of three kernels.
SHARED_CASES = [
    FisherCase("short", (2, 190, 5, 5), (250, 190, 1, 1)),
    FisherCase("spans", (1, 7, 19, 18), (128, 7, 3, 3), padding=(1, 1)),
    FisherCase("wide", (1, 30, 4, 5), (180, 30, 3, 3), padding=(1, 1)),
    FisherCase("longest", (1, 17, 129, 128), (8, 17, 1, 1)),
    FisherCase("small", (2, 27, 6, 6), (70, 27, 3, 3)),
]


def test_a_kernel_is_allowed_its_most_shared_memory_once_per_device(kernels: ModuleType) -> None:
    """Not what each launch needs: another thread's smaller one could come in between."""
    launches = []
    devices = (2, 3)  # on which no other test has launched
    for device in devices:
        kernels.set_device(device)
        for case in (*SHARED_CASES, SHARED_CASES[0]):
            x, dy, _ = random_fisher_inputs(case, torch.bfloat16)
            out = torch.empty(case.size)
            call = conv2d_fisher_args(x, dy, None, case.size, *case.geometry, False, out)
            before = len(kernels.launched_shared())
            kernels.set_shared_limit(99 << 10)  # of sm_86
            emulated.run("conv2d_fisher", call)
            launches += kernels.launched_shared()[before:]
    limits = [limit for limit in kernels.shared_limits() if limit[0] in devices]
    places = [(device, kernel) for device, kernel, _ in limits]
    assert len(places) == len(set(places)), "set more than once"
    most: dict[int, set[int]] = {}
    for _, kernel, size in limits:
        most.setdefault(kernel, set()).add(size)
    assert all(len(sizes) == 1 for sizes in most.values()), "not the same on all devices"
    assert len(set(launches)) > 3, "the cases do not differ in what they need"
    kernels.set_shared_limit(163 << 10)
    assert max(launches) <= max(size for _, _, size in limits) <= 99 << 10, "sm_86 has 99 KB"


@pytest.mark.parametrize("ptx_version", [80, 90])
def test_the_second_stage_is_launched_early_where_it_can_wait(
    kernels: ModuleType, ptx_version: int
) -> None:
    """Code for sm_80 cannot, whatever GPU it is translated for. Either way no sum is read before it
    is written: the emulated first stage runs when the second waits for it, or first."""
    kernels.set_device(ptx_version)  # a kernel's code is asked about once for a device
    kernels.set_ptx_version(ptx_version)
    case = MomentsCase("segments", (2, 20011))
    fisher = FisherCase("splits", (17, 40, 3, 3), (11, 40, 1, 1))

    def launch() -> list[torch.Tensor]:
        pair = random_like_case(case, torch.float32, seed=1)
        (moments, _), *_ = emulated.run_moments("filter_moments", [pair], [1], True, False)
        x, dy, _ = random_fisher_inputs(fisher, torch.bfloat16, seed=1)
        out = torch.full(fisher.size, float("nan"))
        call = conv2d_fisher_args(x, dy, None, fisher.size, *fisher.geometry, False, out)
        emulated.run("conv2d_fisher", call)
        return [moments, out]

    before = kernels.early_launches()
    found = launch()
    assert kernels.early_launches() - before == (2 if ptx_version >= 90 else 0)
    assert all(table.isfinite().all() for table in found)
    kernels.set_device(0)
    kernels.set_ptx_version(90)
    assert all(same_bits(*both) for both in zip(found, launch(), strict=True))


def test_threads_allow_a_kernel_its_shared_memory_once(kernels: ModuleType) -> None:
    before = len(kernels.shared_limits())
    kernels.allow_shared_on_threads(8, 64 << 10)
    assert [size for _, _, size in kernels.shared_limits()[before:]] == [64 << 10]


def test_a_module_built_from_other_sources_is_not_used() -> None:
    script = """
import sys
from types import ModuleType
sys.modules["taylor_kernels._native"] = ModuleType("_native")
from taylor_kernels.backends import native
print(native.cpu_status())
"""
    run = run_program(script)
    assert run.returncode == 0, run.stderr
    assert "did not load" in run.stdout
    assert "set_dtypes" in run.stdout

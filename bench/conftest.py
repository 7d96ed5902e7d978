"""Fixtures of the benches: the device, and the way from measured samples into pytest-benchmark."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_STARTED = time.monotonic()
# Compilation counts as cold: what an earlier run has compiled is out of reach. Set before torch
# reads it.
_COMPILED = tempfile.TemporaryDirectory(prefix="bench-compiled-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _COMPILED.name

import pytest  # noqa: E402
import torch  # noqa: E402

import taylor_kernels as tk  # noqa: E402
from bench.figures import run_of  # noqa: E402
from bench.harness import Provider, Result, copy_bandwidth, measure, use_threads  # noqa: E402
from bench.kept import Kept  # noqa: E402
from bench.ours import isa_of, why_missing  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="the smallest cases, once: does it run, not how fast"
    )
    parser.addoption("--seconds", type=float, help="cases after so long are left out")
    parser.addoption("--results", help="a file that is written anew after every bench")
    parser.addoption("--resume", action="store_true", help="leave out what --results holds")
    parser.addoption("--device", default=None, help="cpu or cuda; default: cuda if there is one")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--results"):
        config.pluginmanager.register(Kept(config))
    # Dynamo gives up on a function after 8 variants and runs it eagerly; let it compile them all.
    import torch._dynamo.config as dynamo

    for name in ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit"):
        if hasattr(dynamo, name):
            setattr(dynamo, name, 4096)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is for another device, which the parameter `on` names, or too much for a
    quick run."""
    here, quick = _device(config).type, config.getoption("--quick")
    items[:] = [
        item
        for item in items
        if item.callspec.params.get("on", here) == here and (not quick or _is_quick(item))
    ]
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK.read))


def _is_quick(item: pytest.Item) -> bool:
    """Whether its parameters are among those that the mark `quick` of its function names."""
    params = item.callspec.params
    return all(
        params[name] in kept
        for mark in item.iter_markers("quick")
        for name, kept in mark.kwargs.items()
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--seconds")
    if limit is not None and time.monotonic() - _STARTED > limit:
        pytest.skip(f"the {limit:.0f} s are over")


def pytest_unconfigure(config: pytest.Config) -> None:
    _COMPILED.cleanup()


class ReplayClock:
    """A clock that moves by measured samples: how they reach pytest-benchmark's statistics.

    pytest-benchmark times one function to the end before the next; here all take turns.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = ReplayClock()


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return _device(pytestconfig)


def _device(config: pytest.Config) -> torch.device:
    name = config.getoption("--device")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(scope="session")
def bandwidth(device: torch.device) -> float | None:
    """The copy bandwidth of a GPU, measured in this run; None on a CPU."""
    return copy_bandwidth(device) if device.type == "cuda" else None


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    return pytestconfig.getoption("--quick")


@pytest.fixture(scope="session")
def rounds(quick: bool) -> Callable[[int], int]:
    return lambda full: 1 if quick else full


@pytest.fixture(scope="session")
def images(quick: bool) -> Callable[[int], int]:
    return lambda full: 2 if quick else full


@pytest.fixture
def one_thread() -> Iterator[None]:
    with use_threads(1):
        yield


class Measured:
    """Results of the case in hand; a case is measured when the first of its providers is asked."""

    def __init__(self, device: torch.device, config: pytest.Config) -> None:
        self._device = device
        self._capture = config.pluginmanager.getplugin("capturemanager")
        self._case: tuple[str, ...] = ()
        self.results: dict[str, Result] = {}

    def get(
        self,
        case: tuple[str, ...],
        providers: Callable[[], Sequence[Provider]],
        rounds: int,
        *,
        keep_busy: bool = True,
    ) -> dict[str, Result]:
        if case != self._case:
            self._case, self.results = (), {}
            with self._capture.global_and_fixture_disabled():  # or its progress would not be seen
                self.results = measure(
                    " ".join(case), providers(), rounds, self._device, keep_busy=keep_busy
                )
            self._case = case
        return self.results

    def holds(self, case: tuple[str, ...]) -> bool:
        return case == self._case


@pytest.fixture(scope="session")
def measured(device: torch.device, pytestconfig: pytest.Config) -> Measured:
    return Measured(device, pytestconfig)


@pytest.fixture
def record(benchmark: Any, bandwidth: float | None, device: torch.device) -> Callable[..., None]:
    """Hand one provider's samples to pytest-benchmark, and all that goes with them."""

    def record_(
        case: tuple[str, ...],
        results: dict[str, Result],
        label: str,
        *,
        bytes_read: int = 0,
        **more: object,
    ) -> None:
        result = results.get(label)
        if result is None or result.unavailable:
            benchmark.skipped = True
            pytest.skip(result.unavailable if result else why_missing(label))
        benchmark.group = " ".join(case)
        benchmark.extra_info.update(
            case=list(case),
            provider=label,
            role=result.role,
            family=result.family,
            isa=isa_of(label) if device.type == "cpu" else None,
            first_call_s=result.first_s,
            host_s=result.host_median,
            ahead=result.ahead,
            error=result.error,
            peak_mib=None if result.peak_bytes is None else result.peak_bytes / 2**20,
            **_ratios(result, results),
            **more,
        )
        if bytes_read:
            speed = bytes_read / result.median
            floor = min((r.median for r in _able(results) if r.role == "floor"), default=None)
            benchmark.extra_info.update(
                bytes_read=bytes_read,
                gb_per_s=speed / 1e9,
                percent_of_floor=None if floor is None else 100 * floor / result.median,
                percent_of_copy=None if bandwidth is None else 100 * speed / bandwidth,
            )
        samples = iter(result.samples)
        benchmark.pedantic(lambda: CLOCK.advance(next(samples)), rounds=len(result.samples))

    return record_


def _able(results: dict[str, Result]) -> list[Result]:
    return [r for r in results.values() if not r.unavailable]


def _ratios(result: Result, results: dict[str, Result]) -> dict[str, float | None]:
    """Median over median: > 1 is slower than the floor, or than ours."""
    able = _able(results)
    floor = min((r.median for r in able if r.role == "floor"), default=None)
    ours = min((r.median for r in able if r.role == "ours"), default=None)
    return {
        "ratio_to_floor": None if floor is None else result.median / floor,
        "ratio_to_ours": None if ours is None else result.median / ours,
    }


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Versions in, names of the machine out."""
    cpu = machine_info.get("cpu", {})
    machine_info.pop("node", None)
    machine_info.pop("release", None)
    machine_info["cpu"] = {key: cpu.get(key) for key in ("brand_raw", "arch", "count")}
    machine_info["isa"] = torch.backends.cpu.get_cpu_capability()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["torch"] = torch.__version__
    machine_info["taylor_kernels"] = tk.__version__
    machine_info["backends"] = {
        name: str(status) for name, status in tk.available_backends().items()
    }
    machine_info["compiler"] = _first_line("c++", "--version")
    machine_info["processor"] = platform.machine()
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()
        machine_info["cuda"] = torch.version.cuda
    try:
        machine_info["torch_pruning"] = version("torch-pruning")
    except PackageNotFoundError:
        machine_info["torch_pruning"] = None


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    for key in ("project", "branch", "author_time"):
        commit_info.pop(key, None)


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list, output_json: dict
) -> None:
    """Shorter samples, no options that would hold an address of a function, and the run's name."""
    for bench in output_json["benchmarks"]:
        bench["extra_info"]["run"] = run_of(output_json)
        bench.pop("options", None)
        bench["stats"]["data"] = [round(sample, 9) for sample in bench["stats"]["data"]]


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0]

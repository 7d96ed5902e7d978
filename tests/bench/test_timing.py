"""What is timed on a GPU is the GPU, not the host that queues for it: shown on a made-up one."""

from __future__ import annotations

import pytest
import torch

from bench import harness
from bench.harness import Provider, measure
from bench.timing import MOST_LEAD, GpuTimer


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.at = 0.0

    def record(self) -> None:
        self.at = self._gpu.launch(0.0, host=1e-6)

    def query(self) -> bool:
        return self._gpu.host >= self.at

    def synchronize(self) -> None:
        self._gpu.host = max(self._gpu.host, self.at)

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Gpu:
    """The times until which the host and the GPU have come; stands for `torch.cuda`."""

    CYCLES = 1.7e9

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def launch(self, seconds: float, host: float) -> float:
        """A kernel that takes so long, and its launch; returns when it ends."""
        self.host += host
        self.device = max(self.host, self.device) + seconds
        return self.device

    def Event(self, enable_timing: bool) -> Event:
        return Event(self)

    def _sleep(self, cycles: int) -> None:
        self.launch(cycles / self.CYCLES, host=1e-6)


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


def timer(gpu: Gpu, keep_busy: bool = True) -> GpuTimer:
    return GpuTimer(torch.device("cpu"), keep_busy, gpu, lambda: gpu.host, flush_bytes=8)


@pytest.mark.parametrize("host", [2e-5, 5e-4, 1e-2])
def test_the_host_is_not_timed(gpu: Gpu, host: float) -> None:
    """Kernels of 10 µs each, launched more slowly than they run."""

    def run() -> None:
        for _ in range(5):
            gpu.launch(1e-5, host=host / 5)

    timing = timer(gpu)
    found = [timing.time(run) for _ in range(12)]
    assert found[-1].ahead
    assert found[-1].seconds == pytest.approx(5e-5, rel=1e-6)
    assert found[-1].host == pytest.approx(host, rel=1e-6)
    waiting = timer(gpu, keep_busy=False).time(run)
    assert not waiting.ahead
    assert waiting.seconds == pytest.approx(max(host + 1e-5, host / 5 + 5e-5), rel=0.1)


def test_a_call_that_waits_for_the_gpu_is_said_to(gpu: Gpu) -> None:
    def run() -> None:
        gpu.launch(1e-5, host=1e-5)
        gpu.host = max(gpu.host, gpu.device)

    timing = timer(gpu)
    before = gpu.host
    found = [timing.time(run) for _ in range(20)]
    assert not any(each.ahead for each in found)
    assert gpu.host - before < 20 * (MOST_LEAD + 1e-3), "leads grow no further"


def test_results_hold_the_host_beside_the_gpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "timer", lambda device, keep_busy: timer(gpu, keep_busy))
    providers = [
        Provider("slow to queue", lambda: gpu.launch(1e-5, host=4e-4)),
        Provider("slow to run", lambda: gpu.launch(4e-4, host=1e-5)),
    ]
    results = measure("test", providers, 5, torch.device("cpu"), memory=False)
    queue, run = (results[p.label] for p in providers)
    assert queue.median == pytest.approx(1e-5, rel=1e-6)
    assert queue.host_median == pytest.approx(4e-4, rel=1e-6)
    assert run.median == pytest.approx(4e-4, rel=1e-6)
    assert run.host_median == pytest.approx(1e-5, rel=1e-6)
    assert queue.ahead == run.ahead == 1


def test_a_cpu_has_no_host_beside_it() -> None:
    (result,) = measure("test", [Provider("some", lambda: None)], 2, torch.device("cpu")).values()
    assert result.host_median is None
    assert result.ahead is None
    assert len(result.samples) == 2

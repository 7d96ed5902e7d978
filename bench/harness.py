"""Measures providers of one answer side by side: checked, timed in turns, then their memory."""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bench.timing import timer

MIB = 2**20
T = TypeVar("T")


def mib_of(model: nn.Module) -> float:
    """The memory of a model's parameters, in MiB."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) / MIB


@dataclass
class Provider:
    """One way to get an answer.

    Attributes:
        label: what tables call it.
        run: computes the answer; this is what is timed.
        check: takes run()'s result and returns its largest error, in eps32 * sum of |terms| or
            whatever unit the bench states; raises AssertionError if that is too large.
        role: `ours`, a `peer`, a `floor` (reads the same bytes, computes next to nothing), or
            `extra` (shown, but in no comparison).
        family: peers of one family are ways to use the same tool; targets name families.
        before: runs untimed before each call.
        rounds: takes part in so many rounds at most, and not in the one to warm up; for those that
            take seconds.
    """

    label: str
    run: Callable[[], Any]
    check: Callable[[Any], float] | None = None
    role: Literal["ours", "peer", "floor", "extra"] = "peer"
    family: str = ""
    before: Callable[[], object] = lambda: None
    rounds: int | None = None


@dataclass
class Result:
    """What was measured of one provider; times in seconds.

    On a GPU the samples are its own time; `host` is what the calls took until they returned, and
    `ahead` the share of them that were queued before the GPU began.
    """

    label: str
    role: str
    family: str
    samples: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    ahead: float | None = None
    first_s: float = 0.0
    peak_bytes: int | None = None
    error: float | None = None
    unavailable: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def host_median(self) -> float | None:
        return statistics.median(self.host) if self.host else None


class Progress:
    """Says what is going on: one line rewritten on a terminal, else a line every few seconds."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._last = 0.0

    def say(self, what: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K  {self._title}: {what}")
        elif time.monotonic() - self._last > 2:
            sys.stderr.write(f"\n  {self._title}: {what}")
            self._last = time.monotonic()
        sys.stderr.flush()

    def done(self) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")


def or_reason(label: str, make: Callable[[], Provider]) -> Provider:
    """The provider that `make` sets up; if it cannot, one whose call says why."""
    try:
        return make()
    except Exception as error:
        reason = error  # `error` itself is gone when the block ends

        def run() -> None:
            raise reason

        return Provider(label, run)


def measure(
    title: str,
    providers: Sequence[Provider],
    rounds: int,
    device: torch.device,
    *,
    memory: bool = True,
    keep_busy: bool = True,
) -> dict[str, Result]:
    """Check every provider, time them in turns, then watch their memory; results by label.

    In each round every provider runs once, in an order drawn anew, so that a slow second of the
    machine, or a provider that leaves the caches in a bad state, hits all alike. A peer that fails
    or gives a wrong answer is left out with the reason; ours failing is an error. On a GPU a sample
    is its own time if it is kept busy while the host queues the call, else with its waiting.
    """
    progress = Progress(title)
    assert all(p.rounds is None or p.rounds > 0 for p in providers), "no round, no sample"
    results = {p.label: Result(p.label, p.role, p.family) for p in providers}
    for provider in providers:
        progress.say(f"{provider.label}: first call and check")
        _check(provider, results[provider.label], device)
    able = [p for p in providers if not results[p.label].unavailable]

    shuffled = random.Random(0)
    timing = timer(device, keep_busy)
    runs_ahead: dict[str, list[bool]] = {p.label: [] for p in able}
    gc.collect()
    gc.disable()
    try:
        for turn in range(-1, rounds):  # the turn before the first only warms up
            progress.say(f"round {max(turn, 0) + 1} of {rounds}")
            for provider in shuffled.sample(able, len(able)):
                if provider.rounds is not None and not 0 <= turn < provider.rounds:
                    continue
                provider.before()
                found = timing.time(provider.run)
                if turn < 0:
                    continue
                results[provider.label].samples.append(found.seconds)
                if found.host is not None:
                    results[provider.label].host.append(found.host)
                    runs_ahead[provider.label].append(found.ahead)
    finally:
        gc.enable()
    del timing
    for label, ahead in runs_ahead.items():
        results[label].ahead = statistics.mean(ahead) if ahead else None
    for provider in able if memory else ():
        progress.say(f"{provider.label}: memory")
        repeats = min(3, provider.rounds or rounds)
        results[provider.label].peak_bytes = peak_memory(provider, device, repeats)
    progress.done()
    return results


def _check(provider: Provider, result: Result, device: torch.device) -> None:
    provider.before()
    start = time.perf_counter()
    try:
        answer = provider.run()
        synchronize(device)
        result.first_s = time.perf_counter() - start
        if provider.check is not None:
            result.error = float(provider.check(answer))
    except Exception as error:
        if provider.role == "ours":
            raise
        result.unavailable = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        sys.stderr.write(f"\n  {provider.label} is left out: {result.unavailable}\n")


def peak_memory(provider: Provider, device: torch.device, repeats: int = 3) -> int | None:
    """Bytes at the peak of one call, beyond what was there before and what it returns.

    CPU: the kernel's high-water mark of resident memory (VmHWM, reset through
    /proc/self/clear_refs), which sees native scratch as well as tensors; free heap is handed back
    first, or memory that earlier calls left behind would hide what this one takes. Resolution is
    about 0.1 MiB. CUDA: the caching allocator's peak. None where neither exists.
    """
    peaks = []
    for _ in range(repeats):
        provider.before()
        gc.collect()
        if _cuda(device):
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            answer = provider.run()
            torch.cuda.synchronize(device)
            peak = torch.cuda.max_memory_allocated(device) - before
        else:
            answer, growth = peak_growth(provider.run)
            if growth is None:
                return None
            peak = growth
        peaks.append(max(0, peak - _bytes_of(answer)))
        del answer
    return int(statistics.median(peaks))


def peak_growth(run: Callable[[], T]) -> tuple[T, int | None]:
    """What a call returns, and the bytes by which the memory of this process grew at most in it.

    Free heap is handed back first: what is made would take its room, and nothing would grow. None
    where the kernel keeps no mark that can be reset.
    """
    gc.collect()
    if not _reset_high_water():
        return run(), None
    before = _status("VmRSS")
    answer = run()
    return answer, _status("VmHWM") - before


def _reset_high_water() -> bool:
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except (OSError, AttributeError):
        return False
    return True


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def _bytes_of(answer: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors_in(answer)}
    return sum(storage.nbytes() for storage in storages.values())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested sequences and dicts."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written both counted, of a device-to-device copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = _times(lambda: target.copy_(source), 15, device)
    return 2 * source.nbytes / statistics.median(times[3:])


def matmul_flops(dtype: torch.dtype, device: torch.device, size: int = 8192) -> float:
    """Operations a second of a square matmul: what the matrix units reach on dense data."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = _times(lambda: a @ b, 9, device)
    return 2 * size**3 / statistics.median(times[3:])


def _times(run: Callable[[], Any], count: int, device: torch.device) -> list[float]:
    timing = timer(device)
    return [timing.time(run).seconds for _ in range(count)]


@contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """PyTorch's threads for a while; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    yield
    torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    """Wait for the device, if it is one that runs ahead of the host."""
    if _cuda(device):
        torch.cuda.synchronize(device)


def _cuda(device: torch.device) -> bool:
    return device.type == "cuda"

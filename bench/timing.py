"""How long a call takes: on a CPU by the clock, on a GPU by events, with the host's time beside it.

A call on a GPU is queued, and small kernels end before the host has queued the next. Events around
it would then time Python. So the GPU is kept busy until the host has queued all: what lies between
the events is what the GPU takes. How long that must be is found out by trying, for each call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

#: More than any L2 (60 MB on an H200).
FLUSH_BYTES = 512 * 2**20
#: Seconds that a GPU is kept busy at first, and at most: a call that waits for the GPU itself, or
#: queues more than fits the queue, is never through before.
FIRST_LEAD, MOST_LEAD = 2e-4, 5e-2
#: A lead is so many times what the host took last.
MARGIN = 1.5


class Timing(NamedTuple):
    """Of one call, in seconds."""

    seconds: float  # of the GPU; on a CPU, of all
    host: float | None = None  # until the call returned; None on a CPU, where it is all
    ahead: bool = True  # the host had queued all before the GPU began


class CpuTimer:
    def time(self, run: Callable[[], Any]) -> Timing:
        start = time.perf_counter()
        answer = run()
        seconds = time.perf_counter() - start
        del answer  # after the clock: freeing what was returned is not part of the answer
        return Timing(seconds)


class GpuTimer:
    """Times calls with a cold L2.

    Args:
        device: whose memory is filled to make it cold.
        keep_busy: what the GPU takes, without the gaps in which it waits for the host. False: with
            them, as a step of training has them.
        cuda, clock: `torch.cuda` and the host's clock, or what stands for them in a test.
    """

    def __init__(
        self,
        device: torch.device,
        keep_busy: bool = True,
        cuda: Any = torch.cuda,
        clock: Callable[[], float] = time.perf_counter,
        flush_bytes: int = FLUSH_BYTES,
    ) -> None:
        self._cuda, self._clock, self._keep_busy = cuda, clock, keep_busy
        self._flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)
        self._leads: dict[int, float] = {}
        self._cycles = self._cycles_a_second()

    def time(self, run: Callable[[], Any]) -> Timing:
        """One call; calls of the same function share what was found out of its lead."""
        lead = self._leads.get(id(run), FIRST_LEAD) if self._keep_busy else 0.0
        start, end = self._events()
        self._flush.zero_()
        if lead:
            self._cuda._sleep(int(lead * self._cycles))
        start.record()
        begin = self._clock()
        answer = run()
        host = self._clock() - begin
        ahead = not start.query()
        end.record()
        end.synchronize()
        del answer
        if self._keep_busy:
            wanted = MARGIN * host if ahead else max(MARGIN * host, 2 * lead)
            self._leads[id(run)] = min(MOST_LEAD, max(FIRST_LEAD, wanted))
        return Timing(start.elapsed_time(end) / 1e3, host, ahead)

    def _events(self) -> tuple[Any, Any]:
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        return start, end

    def _cycles_a_second(self) -> float:
        """Of the clock that `_sleep` counts."""
        cycles = 10_000_000
        for _ in range(2):  # the first may find the clock at rest
            start, end = self._events()
            start.record()
            self._cuda._sleep(cycles)
            end.record()
            end.synchronize()
        return cycles / (start.elapsed_time(end) / 1e3)


def timer(device: torch.device, keep_busy: bool = True) -> CpuTimer | GpuTimer:
    return GpuTimer(device, keep_busy) if device.type == "cuda" else CpuTimer()

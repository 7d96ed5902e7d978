"""Ranks that are threads of one process: the same code but for the wire, at no cost of a start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import taylor_kernels as tk


class Meeting:
    """Where the threads wait for each other, for a bounded time.

    One runs at a time, until it waits: PyTorch's hooks on all optimizers are those of a process.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.turn = threading.Lock()
        self._barrier = threading.Barrier(size, timeout=60)
        self._slots: list[Tensor] = [torch.empty(0)] * size

    def gather(self, rank: int, payload: Tensor) -> list[Tensor]:
        self._slots[rank] = payload
        self._wait()
        everyone = list(self._slots)
        self._wait()
        return everyone

    def _wait(self) -> None:
        if self.size == 1:
            return
        self.turn.release()
        try:
            self._barrier.wait()
        finally:
            self.turn.acquire()

    def abort(self) -> None:
        self._barrier.abort()


class ThreadRanks(tk.distributed.Ranks):
    """A rank that is a thread."""

    def __init__(self, meeting: Meeting, rank: int, **options: Any) -> None:
        self.meeting, self.rank, self.size = meeting, rank, meeting.size
        super().__init__(**options)

    def _join(self, group: object) -> None:
        assert group is None

    def _all_gather(self, payload: Tensor) -> Tensor:
        return torch.cat(self.meeting.gather(self.rank, payload))


class Averaged(nn.Module):
    """What DistributedDataParallel does: after backward() every rank holds the mean gradient."""

    def __init__(self, module: nn.Module, ranks: ThreadRanks) -> None:
        super().__init__()
        self.module, self._ranks = module, ranks

    def forward(self, *given: Any) -> Any:
        return self.module(*given)

    def average(self) -> None:
        for parameter in self.module.parameters():
            grad = parameter.grad
            own = torch.zeros_like(parameter) if grad is None else grad
            everyone = self._ranks.meeting.gather(self._ranks.rank, own.detach().clone())
            parameter.grad = torch.stack(everyone).mean(0)


def in_threads(size: int, function: Callable[..., Any], *given: Any) -> list[Any]:
    """What function(rank, size, meeting, *given) returned in every thread, or its exception."""
    meeting = Meeting(size)
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            with meeting.turn:
                found[rank] = function(rank, size, meeting, *given)
        except BaseException as error:
            found[rank] = error
            meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    causes = [e for e in found if isinstance(e, BaseException)]
    real = [e for e in causes if not isinstance(e, threading.BrokenBarrierError)]
    if real:
        raise real[0]
    assert not causes
    return found

"""The processes that torchrun has started: who writes, when they stop, how they train one model."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from taylor_kernels.distributed.ranks import Ranks
from taylor_kernels.pruning.saving.state import first_line
from taylor_kernels.studies.options import Mistake

#: Seconds that one waits for the others. One that was killed is noticed at once.
TIMEOUT = 600


class Processes:
    """All processes of the run, as one of them sees them.

    Attributes:
        ranks: what the pruner is made with.
        rank, size: this one's number, and how many there are.
    """

    def __init__(self) -> None:
        self.ranks = Ranks()
        self.rank, self.size = self.ranks.rank, self.ranks.size

    @property
    def first(self) -> bool:
        """Whether it is the one that writes files and prints."""
        return self.rank == 0

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """What is done inside is done by all, or fails on all; a collective at its end.

        Raises:
            Mistake: another process has failed. The error of this one is raised as it is.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        try:
            self.ranks.check_done(error, what)
        except RuntimeError as caught:
            raise Mistake(f"torchrun: {caught}") from None

    def heard(self, *flags: bool) -> list[list[bool]]:
        """Flags of every process, in the order of ranks; a collective."""
        everyone = self.ranks.gather(torch.tensor(flags).view(torch.uint8))
        return [[bool(flag) for flag in row] for row in everyone.tolist()]

    def least(self, number: int) -> int:
        """The least number of all processes; a collective."""
        everyone = self.ranks.gather(torch.tensor([number]).view(torch.uint8))
        return int(everyone.view(torch.int64).min())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, where the processes meet, that one has stopped is told in a line.

        Raises:
            Mistake: this one could not go on.
        """
        try:
            yield
        except RuntimeError as error:
            raise Mistake(
                f"torchrun: process {self.rank} of {self.size} cannot go on "
                f"({first_line(error)}); where it is another one that has stopped, that one says "
                "why; --resume goes on from the last checkpoint"
            ) from error


class Wrapped(DistributedDataParallel):
    """Averages the gradients of all processes; its attributes are those of the model in it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


@contextmanager
def processes(device: str) -> Iterator[Processes | None]:
    """The processes of torchrun, which meet inside; None where it did not start this one.

    Args:
        device: that of --device.

    Raises:
        Mistake: they cannot have a GPU each.
    """
    if not started_by_torchrun():
        yield None
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        local, many = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        if device not in ("auto", "cuda") and many > 1:
            raise Mistake(f"--device: {device} is one GPU for {many} processes; give cuda")
        if many > torch.cuda.device_count():
            raise Mistake(
                f"--device: PyTorch sees {torch.cuda.device_count()} GPUs for {many} processes; "
                "start as many, or give --device cpu"
            )
        if many > 1:
            torch.cuda.set_device(local)  # which "cuda" means from now on
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT))
    try:
        yield Processes()
    finally:
        gc.collect()  # a wrapper that outlives its process group can abort the process at its end
        dist.destroy_process_group()


def started_by_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def is_first() -> bool:
    """Whether this process prints: the only one, or the first that torchrun has started."""
    return not started_by_torchrun() or os.environ.get("RANK", "0") == "0"


def check_alone(command: str) -> None:
    """For commands that one process runs.

    Raises:
        Mistake: torchrun has started more.
    """
    if not started_by_torchrun():  # whatever WORLD_SIZE says then
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise Mistake(
            f"torchrun: it has started {size} processes, and {command} is of one; start it without"
        )


def wrapped(model: nn.Module) -> Wrapped:
    """A wrapper that averages gradients; collective.

    Any minibatch may leave other parameters without a gradient, on one process and not on another,
    as where layers are skipped at random. One that is not asked to look for them waits for theirs.
    """
    return Wrapped(model, find_unused_parameters=True)

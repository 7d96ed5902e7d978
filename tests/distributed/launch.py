"""Runs a function on several processes of one group, for a bounded time."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: Seconds that a collective of a test, and a whole run of processes, may take.
COLLECTIVE, RUN = 60.0, 150.0

# The children are forked from a process that has imported all this and has run nothing.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.distributed.preload"])


def joined(rank: int, size: int, folder: str | Path, timeout: float = COLLECTIVE) -> None:
    """Make this process a rank of a gloo group that meets in a folder."""
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )


def _child(function: Callable[..., Any], rank: int, size: int, folder: str, given: tuple) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        joined(rank, size, folder)
        torch.manual_seed(0)
        result = {"result": function(rank, size, *given)}
    except BaseException:
        result = {"error": traceback.format_exc()}
    draft = os.path.join(folder, f"{rank}.draft")
    torch.save(result, draft)
    os.replace(draft, os.path.join(folder, f"{rank}.pt"))
    os._exit(0)  # what a group that has failed waits for at the end is of no use


def ran(size: int, function: Callable[..., Any], *given: Any) -> list[Any]:
    """What function(rank, size, *given) returned on every rank.

    Raises:
        AssertionError: it raised on a rank, or a process died, or took too long; all are killed.
    """
    found = outcomes(size, function, *given)
    for rank, one in enumerate(found):
        assert "result" in one, f"rank {rank} of {size}: {one.get('error', 'died')}"
    return [one["result"] for one in found]


def outcomes(size: int, function: Callable[..., Any], *given: Any) -> list[dict[str, Any]]:
    """Of every rank its "result", or its "error" as text, or neither where it died."""
    with tempfile.TemporaryDirectory() as folder:
        processes: list[BaseProcess] = [
            _CONTEXT.Process(target=_child, args=(function, rank, size, folder, given))
            for rank in range(size)
        ]
        try:
            for process in processes:
                process.start()
            end = time.monotonic() + RUN
            for process in processes:
                process.join(max(end - time.monotonic(), 0.0))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
        found = []
        for rank in range(size):
            path = Path(folder) / f"{rank}.pt"
            found.append(torch.load(path, weights_only=False) if path.exists() else {})
        return found

"""One checkpoint for all ranks: written by one of them, resumed by any number."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import taylor_kernels as tk
from tests.distributed.launch import outcomes, ran
from tests.distributed.prunings import (
    STEPS,
    alike,
    ended,
    minibatch,
    part,
    started,
    step_of,
)
from tests.distributed.threads import ThreadRanks, in_threads


def test_the_state_waits_for_sync(tmp_path):
    def run(rank, size, meeting):
        model, optimizer, pruner = started("taylor_fo_gate", ThreadRanks(meeting, rank))
        for step in range(4):
            step_of(pruner, optimizer, model, model, part(step, rank, size))
        with pytest.raises(RuntimeError, match=r"1 minibatches are this rank's alone .* sync\(\)"):
            pruner.state_dict()
        tk.save_checkpoint(tmp_path / "run.pt", model=model, optimizer=optimizer, pruner=pruner)
        return pruner.state_dict()

    first, second = in_threads(2, run)
    assert torch.equal(first["scores"]["sum"], second["scores"]["sum"])
    assert first["scores"]["count"] == second["scores"]["count"] == 1
    model, optimizer, pruner = started("taylor_fo_gate", None)
    tk.load_checkpoint(tmp_path / "run.pt", model=model, optimizer=optimizer, pruner=pruner)
    assert torch.equal(pruner.state_dict()["scores"]["sum"], first["scores"]["sum"])


def test_a_rank_that_cannot_write_fails_on_all(tmp_path):
    def run(rank, size, meeting):
        model, optimizer, pruner = started("magnitude_l2", ThreadRanks(meeting, rank))
        try:
            tk.save_checkpoint(
                tmp_path / "no" / "run.pt", model=model, optimizer=optimizer, pruner=pruner
            )
        except Exception as error:
            return type(error), str(error)

    found = in_threads(2, run)
    assert found[0][0] is FileNotFoundError
    assert found[1] == (
        RuntimeError,
        "rank 0 could not write the checkpoint; its own error says why",
    )


def resumable(rank, size, folder, victims=(), at=-1, writing=-1):
    """Train from the last checkpoint on; `victims` are killed in step `at`, rank 0 as it writes."""
    ranks = tk.distributed.Ranks(timeout=60)
    model, optimizer, pruner = started("taylor_fo_bn", ranks)
    path, start = Path(folder) / "run.pt", 0
    if path.exists():
        extra = tk.load_checkpoint(path, model=model, optimizer=optimizer, pruner=pruner)
        start = extra["step"]
    wrapped = DistributedDataParallel(model)
    for step in range(start, STEPS):
        if step == at and rank in victims:
            os.kill(os.getpid(), signal.SIGKILL)
        step_of(pruner, optimizer, model, wrapped, part(step, rank, size))
        if step == 7:
            pruner.compact()
            wrapped = tk.distributed.rewrapped(wrapped)
        if step % 2:
            if step == writing and rank == 0:
                os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
            tk.save_checkpoint(
                path, model=wrapped, optimizer=optimizer, pruner=pruner, step=step + 1
            )
    return ended(model, pruner) | {"start": start}


def test_killed_with_four_resumed_with_two_and_one(tmp_path):
    killed = outcomes(4, resumable, tmp_path, [2], 4)
    assert not killed[2]
    assert all("error" in killed[rank] for rank in (0, 1, 3))
    assert not any(outcomes(4, resumable, tmp_path, range(4), 6))
    writing = outcomes(2, resumable, tmp_path, [], -1, 9)
    assert not writing[0]
    assert "the ranks' exchange failed" in writing[1]["error"]
    assert len(list(tmp_path.iterdir())) == 2  # what was being written is beside the old file
    (last,) = ran(1, resumable, tmp_path)
    assert last["start"] == 8
    model, optimizer, pruner = started("taylor_fo_bn", None)
    for step in range(STEPS):
        step_of(pruner, optimizer, model, model, minibatch(step))
        if step == 7:
            pruner.compact()
    alike(last, ended(model, pruner))

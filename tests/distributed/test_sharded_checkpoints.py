"""Checkpoints that ranks write in parts: killed at any time, resumed by any number of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

import taylor_kernels as tk
from taylor_kernels.shards import is_sharded, whole
from tests.distributed.launch import outcomes, ran
from tests.distributed.prunings import (
    STEPS,
    alike,
    ended,
    minibatch,
    part,
    same_bits,
    sharded,
    started,
    step_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def resumed(rank, size, folder, way, victims=(), at=-1, writing=-1, last=STEPS):
    """Train in parts from the last checkpoint on, and write one every second step.

    Args:
        way: "whole", where the checkpoint is read into a whole model that is cut and then sharded,
            or "parts", where it is read into the shards of a model that was cut before.
        victims: are killed in step `at`, or as they write the checkpoint of step `writing`.
    """
    model, old, pruner = started("taylor_fo", tk.distributed.Ranks(timeout=60))
    start, there = 0, any(Path(folder).glob("*/.metadata"))
    if there and way == "whole":
        start = tk.load_sharded_checkpoint(folder, model=model, optimizer=old, pruner=pruner)
        pruner.compact()
    elif there:
        pruner.load_state_dict(tk.read_sharded_checkpoint(folder)["pruner"])
    optimizer = sharded(model, pruner, old)
    if there and way == "parts":
        start = tk.load_sharded_checkpoint(folder, model=model, optimizer=optimizer, pruner=pruner)
        assert all(is_sharded(state["momentum_buffer"]) for state in optimizer.state.values())
    start = start["step"] if there else 0
    for step in range(start, last):
        if step == at and rank in victims:
            os.kill(os.getpid(), signal.SIGKILL)
        step_of(pruner, optimizer, model, model, part(step, rank, size))
        if step % 2:
            if step == writing and rank in victims:
                os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
            tk.save_sharded_checkpoint(
                folder, model=model, optimizer=optimizer, pruner=pruner, step=step + 1
            )
    found = ended(model, pruner) | {"start": start}
    found["weights"] = {name: whole(value) for name, value in found["weights"].items()}
    return found


def test_killed_with_four_resumed_with_two_and_one(tmp_path):
    folder = tmp_path / "runs" / "one"
    killed = outcomes(4, resumed, folder, "parts", [2], 4)
    assert not killed[2]
    # They end by themselves: those that do not are killed after a while, and leave no error.
    assert all("RuntimeError" in killed[rank]["error"] for rank in (0, 1, 3))
    assert [one.name for one in folder.iterdir()] == ["checkpoint-00000001"]  # of step 4

    # With two, of a model that is cut now: one is killed while both write.
    writing = outcomes(2, resumed, folder, "whole", [1], -1, 7)
    assert not writing[1]
    assert "rank 0 of 2: the checkpoint" in writing[0]["error"]
    assert "has another rank stopped" in writing[0]["error"]
    assert not (folder / "checkpoint-00000003" / ".metadata").exists()
    assert (folder / "checkpoint-00000002" / ".metadata").exists()  # of step 6

    # With two again, that read their parts: all are killed.
    assert not any(outcomes(2, resumed, folder, "parts", [0, 1], 9))

    model, optimizer, pruner = started("taylor_fo", None)
    given = {"model": model, "optimizer": optimizer, "pruner": pruner}
    assert tk.load_sharded_checkpoint(folder, **given) == {"step": 8}
    for step in range(8, STEPS):
        step_of(pruner, optimizer, model, model, minibatch(step))
    last = ended(model, pruner)

    model, optimizer, pruner = started("taylor_fo", None)
    for step in range(STEPS):
        step_of(pruner, optimizer, model, model, minibatch(step))
        if step == 3:
            pruner.compact()
    alike(last, ended(model, pruner))


def both_ways(rank, size, folder):
    first = resumed(rank, size, folder, "parts")
    model, optimizer, pruner = started("taylor_fo", tk.distributed.Ranks(timeout=60))
    optimizer = sharded(model, pruner, optimizer)
    said, given = [], {"model": model, "optimizer": optimizer, "pruner": pruner}
    bad = object() if rank == 0 else 1
    for call in (
        lambda: tk.load_sharded_checkpoint(Path(folder) / "none", **given),
        lambda: tk.save_sharded_checkpoint(folder, **given, bad=bad),
    ):
        try:
            call()
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    pruner.close()
    model, old, pruner = started("taylor_fo", tk.distributed.Ranks(timeout=60))
    tk.load_sharded_checkpoint(folder, model=model, optimizer=old, pruner=pruner)
    pruner.compact()
    optimizer = sharded(model, pruner, old)
    tk.save_sharded_checkpoint(folder, model=model, optimizer=optimizer, pruner=pruner)
    pruner.close()
    model, old, pruner = started("taylor_fo", tk.distributed.Ranks(timeout=60))
    optimizer = sharded(model, pruner, old)
    before = [whole(p.detach()).clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"^model: filters have been removed from that of the"):
        tk.load_sharded_checkpoint(folder, model=model, optimizer=optimizer, pruner=pruner)
    assert all(map(torch.equal, before, [whole(p.detach()) for p in model.parameters()]))
    return first | {"said": said}


def test_what_fails_on_one_rank_fails_on_all_and_changes_nothing(tmp_path):
    found = ran(2, both_ways, tmp_path)
    same_bits(found)
    first, second = (one["said"] for one in found)
    assert first[0].startswith("FileNotFoundError: folder: there is no whole checkpoint in")
    assert second[0] == first[0]
    assert first[1].startswith("TypeError: bad: expected tensors and plain Python")
    assert (
        second[1] == "RuntimeError: rank 0 could not begin the checkpoint; its own error says why"
    )


def plain(rank, size, folder):
    """A model that DistributedDataParallel wraps, without a pruner; then another optimizer on 1."""
    torch.manual_seed(rank)  # DDP hands on rank 0's weights
    model = torch.nn.Linear(3, 2)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    wrapped(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    for step in range(2):
        tk.save_sharded_checkpoint(folder, model=wrapped, optimizer=optimizer, rank=rank, step=step)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    again = torch.nn.Linear(3, 2)
    before = {name: value.clone() for name, value in again.state_dict().items()}
    kind = torch.optim.SGD if rank else torch.optim.Adam
    given = {"momentum": 0.9} if rank else {}
    its = kind(again.parameters(), 0.5, **given)
    try:
        tk.load_sharded_checkpoint(folder, model=again, optimizer=its)
        said = "nothing"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    same = all(torch.equal(value, before[name]) for name, value in again.state_dict().items())
    unchanged = same and not its.state and its.param_groups[0]["lr"] == 0.5
    its = torch.optim.Adam(again.parameters(), 0.5)
    extra = tk.load_sharded_checkpoint(folder, model=again, optimizer=its)
    back = all(torch.equal(value, saved[name]) for name, value in again.state_dict().items())
    return {"said": said, "unchanged": unchanged, "extra": extra, "back": back}


def test_ranks_with_whole_models_write_one_checkpoint(tmp_path):
    first, second = ran(2, plain, tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["checkpoint-00000001"]
    assert first["extra"] == second["extra"] == {"rank": 0, "step": 1}
    assert first["back"]
    assert second["back"]
    # An optimizer that does not fit on one rank: no rank has loaded anything.
    assert first["said"].startswith("RuntimeError: rank 1 could not read the checkpoint")
    assert second["said"].startswith("ValueError: optimizer: ")
    assert first["unchanged"]
    assert second["unchanged"]


def test_one_process_alone(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    tk.save_sharded_checkpoint(tmp_path, model=model, optimizer=optimizer, epoch=1)
    tk.save_sharded_checkpoint(tmp_path, model=model, optimizer=optimizer, epoch=2)
    again = torch.nn.Linear(3, 2)
    its = torch.optim.Adam(again.parameters(), 1.0)
    assert tk.load_sharded_checkpoint(tmp_path, model=again, optimizer=its) == {"epoch": 2}
    assert torch.equal(again.weight, model.weight)
    assert its.param_groups[0]["lr"] == 0.1
    for one, other in zip(its.state.values(), optimizer.state.values(), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(ValueError, match="model: the file is of another model"):
        tk.load_sharded_checkpoint(tmp_path, model=torch.nn.Linear(3, 1), optimizer=its)
    with pytest.raises(ValueError, match="optimizer: one is in the file, but was not given"):
        tk.load_sharded_checkpoint(tmp_path, model=again)
    (data,) = tmp_path.glob("*/*.distcp")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        tk.load_sharded_checkpoint(tmp_path, model=again, optimizer=its)


def test_what_else_is_in_the_folder_stays(tmp_path):
    model = torch.nn.Linear(3, 2)
    kept = [
        tmp_path / name
        for name in (
            "20240101/notes.txt",
            "00000000/__0_0.distcp",
            "checkpoint-0/model.pt",
            "checkpoint-00000000/my-copy.pt",  # beside nothing of ours
            "checkpoint-00000000/more/__0_0.distcp",
            "checkpoint-00000001",  # a file
            "old-checkpoint-00000000/.metadata",
        )
    ]
    for one in kept:
        one.parent.mkdir(parents=True, exist_ok=True)
        one.write_text(one.name)
    for epoch in range(3):
        tk.save_sharded_checkpoint(tmp_path, model=model, epoch=epoch)
    assert [one.read_text() for one in kept] == [one.name for one in kept]
    assert tk.load_sharded_checkpoint(tmp_path, model=model) == {"epoch": 2}
    assert len(list(tmp_path.glob("*/__0_0.distcp"))) == 2  # one checkpoint's, and the user's

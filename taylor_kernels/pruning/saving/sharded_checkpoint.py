"""Checkpoints to which every rank writes the parts that it holds, in a folder of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from taylor_kernels.checks import check_path
from taylor_kernels.distributed.ranks import Ranks
from taylor_kernels.pruning.pruner import Pruner
from taylor_kernels.pruning.saving.apart import followed_by, with_memory, without_memory
from taylor_kernels.pruning.saving.checkpoint import (
    check_content,
    check_optimizers,
    parts_of,
    restored,
)
from taylor_kernels.pruning.saving.checkpoint_folder import (
    FORMAT,
    PLAIN,
    latest,
    named,
    next_number,
    packed,
    read,
    read_plain,
    remove_older,
    write,
)
from taylor_kernels.pruning.saving.given import bare, check_belongs, check_given
from taylor_kernels.pruning.saving.plain import as_plain
from taylor_kernels.pruning.saving.state import VERSION
from taylor_kernels.shards import in_parts, is_sharded
from taylor_kernels.tracing.run.running import outside_inference_mode


def save_sharded_checkpoint(
    folder: str | bytes | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    pruner: Pruner | None = None,
    **extra: Any,
) -> None:
    """Write the state of a run to a folder, every rank the parts of tensors that it holds.

    For parameters of which a rank holds a part (DTensors of FSDP2 or tensor parallelism), which
    `save_checkpoint` would bring together in the memory of every rank. All ranks of the pruner, or
    without one all of torch.distributed, call it, whatever the model is wrapped in; of what they
    hold alike rank 0's is written. Any number of ranks may go on from it. A crash at any time
    leaves the checkpoint that was there before.

    Args:
        folder: made where it is missing, in one that all ranks see. The checkpoint is in a folder
            of its own in it, `checkpoint-00000001` or another number; of what else is there nothing
            is touched.
        model, optimizer, pruner, extra: as those of `save_checkpoint`.

    Raises:
        TypeError: a part is something else than those of `save_checkpoint`.
        RuntimeError: ranks have pruned other filters, or one could not write, or stopped. How long
            the others wait for it is the timeout of the process group.
        OSError: the folder cannot be written. The checkpoint that was there still is.

    Example:
        >>> import tempfile, torch, taylor_kernels as tk
        >>> model = torch.nn.Linear(3, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tk.save_sharded_checkpoint(folder, model=model, epoch=3)
        ...     tk.load_sharded_checkpoint(folder, model=model)
        {'epoch': 3}
    """
    folder = _checked(folder)
    model = bare(model)
    check_given(model, optimizer, pruner)
    ranks = _ranks(model, pruner)
    if pruner is not None:
        pruner.sync()
        pruner.check_masks()
    first = ranks is None or ranks.rank == 0
    entries: dict[str, Tensor] = {}
    error: Exception | None = None
    number = 0
    try:
        parts = parts_of(model, optimizer, pruner)
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION, "pruner": parts["pruner"]}
        for name in ("model", "optimizer"):
            content[name] = without_memory(parts[name], name, entries)
        if first:
            for name in ("model", "optimizer", "pruner"):
                content[name] = as_plain(content[name], name)
            content["extra"] = {name: as_plain(value, name) for name, value in extra.items()}
            entries[PLAIN] = packed(content)
            number = next_number(folder)
        else:  # of what all hold alike rank 0's is written
            entries = {name: tensor for name, tensor in entries.items() if is_sharded(tensor)}
    except Exception as caught:
        error = caught
    number = _agreed(ranks, error, "begin the checkpoint", number)
    write(named(folder, number), entries, ranks)
    if first:
        remove_older(folder, number)


def read_sharded_checkpoint(folder: str | bytes | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint holds beside tensors of the model and the optimizer: "pruner" and "extra".

    `Pruner.load_state_dict` of the pruner's state cuts a model that is whole to the structure that
    it had; sharded then, it takes the rest from `load_sharded_checkpoint`, part by part.

    Raises:
        FileNotFoundError: no checkpoint in the folder is whole.
        ValueError: it is damaged, or not one of these.

    Example:
        >>> import tempfile, torch, taylor_kernels as tk
        >>> model = torch.nn.Linear(3, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tk.save_sharded_checkpoint(folder, model=model, epoch=3)
        ...     tk.read_sharded_checkpoint(folder)
        {'pruner': None, 'extra': {'epoch': 3}}
    """
    folder = _checked(folder)
    content = read_plain(latest(folder))
    return {"pruner": content["pruner"], "extra": content["extra"]}


@outside_inference_mode()
def load_sharded_checkpoint(
    folder: str | bytes | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    pruner: Pruner | None = None,
) -> dict[str, Any]:
    """Put a run back where `save_sharded_checkpoint` left it, on any number of ranks.

    A model that is whole is cut to the structure that it had, as by `load_checkpoint`; one that is
    sharded takes the parts that its ranks hold, and has to have that structure already (see
    `read_sharded_checkpoint`). The ranks that would save it together load it together. PyTorch
    reads the index with pickle, which can run code: load no folder that you do not trust. Nor does
    it keep checksums of tensors: a file that is cut off is noticed, other bits in it are not.

    Returns:
        The extras that were saved.

    Raises:
        FileNotFoundError: no checkpoint in the folder is whole.
        TypeError: a part is something else.
        ValueError: the checkpoint is damaged, or of another model, optimizer, criterion or set of
            parts; or the model is sharded and has another structure. Nothing has changed, on
            any rank.
        RuntimeError: the pruner is closed, or another rank could not read. Nothing has changed.

    Example:
        >>> import tempfile, torch, taylor_kernels as tk
        >>> model, again = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tk.save_sharded_checkpoint(folder, model=model)
        ...     _ = tk.load_sharded_checkpoint(folder, model=again)
        >>> torch.equal(again.weight, model.weight)
        True
    """
    folder = _checked(folder)
    model = bare(model)
    check_given(model, optimizer, pruner)
    check_belongs(optimizer, pruner)
    ranks = _ranks(model, pruner)
    error: Exception | None = None
    content: dict[str, Any] = {}
    try:
        target = latest(folder)
        content = read_plain(target)
        _check_structure(content, model, pruner)
        check_content(content, model, optimizer, pruner)
        entries: dict[str, Tensor] = {}
        state = model.state_dict()
        content["model"] = with_memory(content["model"], "model", entries, state.get)
        content["optimizer"] = with_memory(
            content["optimizer"], "optimizer", entries, followed_by(content["optimizer"], optimizer)
        )
        check_optimizers(content, model, optimizer, pruner)
        read(target, entries)
    except Exception as caught:
        error = caught
    _agreed(ranks, error, "read the checkpoint")
    return restored(content, model, optimizer, pruner)


def _checked(folder: str | bytes | os.PathLike[str]) -> str:
    check_path(folder, "folder")
    return os.fsdecode(folder)


def _ranks(model: nn.Module, pruner: Pruner | None) -> Ranks | None:
    """Those who write together; None where this process is alone."""
    if pruner is not None and pruner.ranks is not None:
        return pruner.ranks
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return Ranks() if several or in_parts(model) else None


def _agreed(ranks: Ranks | None, error: Exception | None, what: str, number: int = 0) -> int:
    """Rank 0's number, once all ranks have come without an error; a collective."""
    if ranks is not None:
        ranks.check_done(error, what)
        return int(ranks.gather(torch.tensor([number]).view(torch.uint8))[0].view(torch.int64))
    if error is not None:
        raise error
    return number


def _check_structure(content: Mapping[str, Any], model: nn.Module, pruner: Pruner | None) -> None:
    if pruner is None or content["pruner"] is None or not in_parts(model):
        return
    after = pruner.shapes_after(content["pruner"])
    have = dict(model.state_dict())
    if any(tuple(have[name].shape) != shape for name, shape in after.items()):
        raise ValueError(
            "model: filters have been removed from that of the checkpoint, and its parameters are "
            "in parts on several ranks and cannot be cut there; pruner.load_state_dict("
            'read_sharded_checkpoint(folder)["pruner"]) cuts it before fully_shard()'
        )

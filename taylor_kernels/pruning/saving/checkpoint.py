"""Checkpoints of a run: the model, the optimizer and the pruner in one file, or nothing at all."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from taylor_kernels.checks import check_path
from taylor_kernels.files import write_atomically
from taylor_kernels.pruning.pruner import Pruner
from taylor_kernels.pruning.saving.given import bare, check_belongs, check_given
from taylor_kernels.pruning.saving.optimizer_saving import (
    check_optimizer_states,
    load_optimizer_states,
    optimizer_states,
)
from taylor_kernels.pruning.saving.plain import as_plain
from taylor_kernels.pruning.saving.state import (
    VERSION,
    check_model_state,
    check_version,
    first_line,
)
from taylor_kernels.shards import in_parts, whole_state
from taylor_kernels.tracing.run.running import outside_inference_mode

FILE_FORMAT = "taylor_kernels.checkpoint"


def save_checkpoint(
    path: str | bytes | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    pruner: Pruner | None = None,
    **extra: Any,
) -> None:
    """Write the state of a run to one file, all at once: a crash leaves the old file or the new.

    With a pruner of several ranks every rank calls it, and rank 0 writes: its model and its extras.
    The file says nothing of their number, so that any number may go on, one process among them.

    Args:
        model: that of the run, or the DistributedDataParallel around it. Where a rank holds a part
            of its parameters (FSDP2), the file holds all of them.
        optimizer: one, or a list of them; those that they wrap are saved with them.
        extra: whatever else the run needs to go on (epoch, random state, a scheduler's
            state_dict): tensors and plain Python.

    Raises:
        TypeError: a part is something else, or it holds what `load_checkpoint` would refuse:
            objects other than tensors and plain Python. (numpy's numbers become Python's.)
        ValueError: the pruner is of another model.
        FileNotFoundError: there is no such folder.
        RuntimeError: ranks have pruned other filters, or one could not write, or did not come.

    Example:
        >>> import os, tempfile, torch, taylor_kernels as tk
        >>> model = torch.nn.Linear(3, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tk.save_checkpoint(os.path.join(folder, "run.pt"), model=model, epoch=3)
        ...     os.listdir(folder)
        ['run.pt']
    """
    check_path(path)
    model = bare(model)
    check_given(model, optimizer, pruner)
    if pruner is None or pruner.ranks is None:
        _write(path, parts_of(model, optimizer, pruner), extra)
        return
    pruner.sync()
    pruner.check_masks()
    parts = whole_state(parts_of(model, optimizer, pruner))  # on all ranks: each holds a part
    error: Exception | None = None
    if pruner.ranks.rank == 0:
        try:
            _write(path, parts, extra)
        except Exception as caught:
            error = caught
    pruner.ranks.check_done(error, "write the checkpoint")


def parts_of(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    pruner: Pruner | None,
) -> dict[str, Any]:
    """The states of those of a run that are given; None for each of the others."""
    return {
        "model": model.state_dict(),
        "optimizer": None if optimizer is None else optimizer_states(optimizer),
        "pruner": None if pruner is None else pruner.state_dict(),
    }


def _write(
    path: str | bytes | os.PathLike[str], parts: dict[str, Any], extra: dict[str, Any]
) -> None:
    content = {
        "format": FILE_FORMAT,
        "version": VERSION,
        **{name: as_plain(part, name) for name, part in parts.items()},
        "extra": {name: as_plain(value, name) for name, value in extra.items()},
    }
    write_atomically(path, lambda file: torch.save(content, file))


@outside_inference_mode()
def load_checkpoint(
    path: str | bytes | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    pruner: Pruner | None = None,
) -> dict[str, Any]:
    """Put a run back where `save_checkpoint` left it.

    Build model, optimizer and pruner as at the start of the run first; the model takes on the
    structure that it had when it was saved. With several ranks every one calls it. A model that
    DistributedDataParallel wraps is to be wrapped anew, as after compact().

    Returns:
        The extras that were saved.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: a part is something else.
        ValueError: the file is damaged, not a checkpoint, or of another model, optimizer,
            criterion or set of parts; or the pruner is not of this model and optimizer. Nothing
            has changed.
        RuntimeError: the pruner is closed. Nothing has changed.

    Example:
        >>> import os, tempfile, torch, taylor_kernels as tk
        >>> def start():
        ...     model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))
        ...     return model, tk.Pruner(model, torch.randn(1, 3), "magnitude_l2", filters=0.5)
        >>> (model, pruner), (again, its_pruner) = start(), start()
        >>> while not pruner.done:
        ...     _ = pruner.step()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "run.pt")
        ...     tk.save_checkpoint(path, model=model, pruner=pruner, epoch=3)
        ...     tk.load_checkpoint(path, model=again, pruner=its_pruner)
        {'epoch': 3}
        >>> its_pruner.done, torch.equal(again[0].weight, model[0].weight)
        (True, True)
    """
    check_path(path)
    model = bare(model)
    check_given(model, optimizer, pruner)
    if in_parts(model):
        raise ValueError(
            "model: its parameters are in parts on several ranks; load the checkpoint into the "
            "model as it was before fully_shard(), shard it then, and take the optimizer's state "
            "along with tk.distributed.carry_state"
        )
    check_belongs(optimizer, pruner)
    content = read_checkpoint(path)
    check_content(content, model, optimizer, pruner)
    check_optimizers(content, model, optimizer, pruner)
    return restored(content, model, optimizer, pruner)


def check_content(
    content: Mapping[str, Any], model: nn.Module, optimizer: object, pruner: Pruner | None
) -> dict[str, tuple[int, ...]]:
    """The parts of a checkpoint are those that are given, and of this model.

    Args:
        content: "model", "optimizer" and "pruner"; of the model's tensors the shapes are looked at.

    Returns:
        The shapes that the pruner's state gives what it cuts.

    Raises:
        ValueError: they are not.
    """
    for name, part in (("model", model), ("optimizer", optimizer), ("pruner", pruner)):
        if (content.get(name) is None) != (part is None):
            have, lack = ("was given", "is none in the file")
            if part is None:
                have, lack = ("is in the file", "was not given")
            raise ValueError(f"{name}: one {have}, but {lack}; pass the parts that were saved")
    shapes = {
        name: tuple(value.shape) if isinstance(value, Tensor) else None
        for name, value in model.state_dict().items()
    }
    cut = {} if pruner is None else pruner.shapes_after(content["pruner"])
    gone = set() if pruner is None else set(pruner.gone_after(content["pruner"]))
    left = {name: shape for name, shape in (shapes | cut).items() if name not in gone}
    check_model_state(content["model"], left)
    return cut


def check_optimizers(
    content: Mapping[str, Any], model: nn.Module, optimizer: Any, pruner: Pruner | None
) -> None:
    """The optimizers take their states in what `check_content` has let pass.

    Raises:
        ValueError: one does not. Nothing has changed.
    """
    if optimizer is None:
        return
    cut = {} if pruner is None else pruner.shapes_after(content["pruner"])
    after = {p: cut.get(name, tuple(p.shape)) for name, p in model.named_parameters()}
    gone = set() if pruner is None else set(pruner.gone_after(content["pruner"]))
    leaving = [p for name, p in model.named_parameters() if name in gone]
    check_optimizer_states(
        content["optimizer"], optimizer, {} if pruner is None else after, leaving
    )


def restored(
    content: Mapping[str, Any], model: nn.Module, optimizer: Any, pruner: Pruner | None
) -> dict[str, Any]:
    """Put back what `check_content` and `check_optimizers` have let pass; the extras."""
    if pruner is not None:
        pruner.load_state_dict(content["pruner"])
    model.load_state_dict(content["model"])
    if optimizer is not None:
        load_optimizer_states(content["optimizer"], optimizer)
    return content["extra"]


def read_checkpoint(path: str | bytes | os.PathLike[str]) -> dict[str, Any]:
    """What `save_checkpoint` wrote: "model", "optimizer", "pruner" and "extra".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not a checkpoint.
    """
    path = os.fsdecode(path)
    try:
        # torch.load takes damaged tensors as they are; the archive holds a checksum of each.
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"checksum of {broken} does not match")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except pickle.UnpicklingError as error:
        # PyTorch says what is wrong at the end of a long explanation.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0]
        raise ValueError(
            f"path: {path!r} is whole, but holds objects other than tensors and plain "
            f"Python, which are not loaded since that can run code ({reason}); if you trust it, "
            "read it with torch.load(weights_only=False) and load its parts one by one"
        ) from error
    except Exception as error:
        raise ValueError(
            f"path: {path!r} is damaged or not a checkpoint ({first_line(error)})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FILE_FORMAT:
        raise ValueError(f"path: {path!r} was not written by save_checkpoint")
    check_version(content, f"path: {path!r}")
    if not isinstance(content.get("extra"), dict):
        raise ValueError(f"path: {path!r} is damaged (it has no extras)")
    return content

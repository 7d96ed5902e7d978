"""Checkpoints of a run: the model, the optimizer and the pruner in one file, or nothing at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from taylor_kernels.pruning.records import PruneRecord

if TYPE_CHECKING:
    from taylor_kernels.pruning.pruner import Pruner

PRUNER_FORMAT = "taylor_kernels.Pruner"
FILE_FORMAT = "taylor_kernels.checkpoint"
VERSION = 1


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    pruner: Pruner | None = None,
    **extra: Any,
) -> None:
    """Write the state of a run to one file, all at once: a crash leaves the old file or the new.

    Args:
        extra: whatever else the run needs to go on (epoch, random state, a scheduler's
            state_dict): tensors and plain Python.

    Raises:
        TypeError: an extra is something else, which `load_checkpoint` would refuse.
    """
    for name, value in extra.items():
        _check_plain(value, name)
    content = {
        "format": FILE_FORMAT,
        "version": VERSION,
        "model": model.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "pruner": None if pruner is None else pruner.state_dict(),
        "extra": extra,
    }
    target = Path(path)
    # In the same directory, so that the replacement is a rename.
    handle, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
        raise
    if hasattr(os, "O_DIRECTORY"):
        # The rename itself lasts through a power cut only once the directory is on the disk.
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    pruner: Pruner | None = None,
) -> dict[str, Any]:
    """Put a run back where `save_checkpoint` left it.

    Build model, optimizer and pruner as at the start of the run first; the model takes on the
    structure that it had when it was saved.

    Returns:
        The extras that were saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, not a checkpoint, or of another model, criterion or set of
            parts. Nothing has changed.
    """
    try:
        # torch.load takes damaged tensors as they are; the archive holds a checksum of each.
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"checksum of {broken} does not match")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:
        raise ValueError(
            f"path: {os.fspath(path)!r} is damaged or not a checkpoint ({_first_line(error)})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FILE_FORMAT:
        raise ValueError(f"path: {os.fspath(path)!r} was not written by save_checkpoint")
    _check_version(content, f"path: {os.fspath(path)!r}")
    for name, part in (("model", model), ("optimizer", optimizer), ("pruner", pruner)):
        if (content.get(name) is None) != (part is None):
            have, lack = ("was given", "is none in the file")
            if part is None:
                have, lack = ("is in the file", "was not given")
            raise ValueError(f"{name}: one {have}, but {lack}; pass the parts that were saved")
    if not isinstance(content.get("extra"), dict):
        raise ValueError(f"path: {os.fspath(path)!r} is damaged (it has no extras)")

    # All is looked at before anything is touched.
    shapes = {name: tuple(getattr(t, "shape", ())) for name, t in model.state_dict().items()}
    if pruner is not None:
        if pruner.model is not model:
            raise ValueError("pruner: it prunes another model than the one given")
        shapes |= pruner.shapes_after(content["pruner"])
    _check_model_state(content["model"], shapes)
    if optimizer is not None:
        _check_optimizer_state(content["optimizer"], optimizer)

    if pruner is not None:
        pruner.load_state_dict(content["pruner"])
    model.load_state_dict(content["model"])
    if optimizer is not None:
        optimizer.load_state_dict(content["optimizer"])
    return content["extra"]


def check_pruner_state(state: Any, structure: list, criterion: str) -> dict[str, Any]:
    """A state_dict that a pruner with this structure and criterion wrote, or a ValueError."""
    if not isinstance(state, Mapping) or state.get("format") != PRUNER_FORMAT:
        raise ValueError("state: it is not the state_dict of a tk.Pruner")
    _check_version(state, "state")
    if state.get("criterion") != criterion:
        raise ValueError(
            f"state: its scores are by {state.get('criterion')!r}, this pruner's by {criterion!r}; "
            "build the pruner with the same importance"
        )
    if state.get("structure") != structure:
        raise ValueError(
            "state: it is of another model, or of other prunable layers; build the pruner with the "
            "same model, as it was at first, and the same ignore, round_to and min_filters"
        )
    damage = _damage(state, [group[0][2] for group in structure])
    if damage:
        raise ValueError(f"state: it is damaged ({damage})")
    return dict(state)


def _damage(state: Mapping[str, Any], sizes: list[int]) -> str:
    for name in ("removed", "compacted"):
        masks = state.get(name)
        if not isinstance(masks, list) or len(masks) != len(sizes):
            return f"{name!r} is not a list of {len(sizes)} masks"
        for mask, size in zip(masks, sizes, strict=True):
            if not _is_tensor(mask, torch.bool, size) or mask.all():
                return f"a mask in {name!r} does not fit its group"
    for off, cut in zip(state["removed"], state["compacted"], strict=True):
        if (cut & ~off).any():
            return "units are compacted that were never removed"
    remaining = sum(int((~mask).sum()) for mask in state["compacted"])
    scores = state.get("scores")
    if not isinstance(scores, dict) or not _is_count(scores.get("count")):
        return "the running scores are missing"
    for name in ("sum", "average"):
        values = scores.get(name)
        if values is not None and not _is_tensor(values, torch.float64, remaining):
            return f"the {name} of the scores does not fit the units"
    if (scores["count"] > 0) != (scores.get("sum") is not None):
        return "the sum of the scores does not fit their count"
    if not _is_count(state.get("steps")):
        return "'steps' is not a count"
    names = {field.name for field in fields(PruneRecord)}
    history = state.get("history")
    if not isinstance(history, list) or not all(
        isinstance(record, dict) and record.keys() == names for record in history
    ):
        return "'history' does not hold records"
    return ""


def _check_model_state(state: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if not isinstance(state, Mapping):
        raise ValueError("model: its state in the file is damaged")
    differing = sorted(state.keys() ^ shapes.keys())
    differing += [
        name
        for name in state.keys() & shapes.keys()
        if isinstance(state[name], Tensor) and tuple(state[name].shape) != shapes[name]
    ]
    if differing:
        raise ValueError(
            f"model: the file is of another model; {len(differing)} entries differ, among them "
            f"{', '.join(differing[:3])}"
        )


def _check_optimizer_state(state: Any, optimizer: Optimizer) -> None:
    own = [len(group["params"]) for group in optimizer.param_groups]
    try:
        saved = [len(group["params"]) for group in state["param_groups"]]
    except (TypeError, KeyError) as error:
        raise ValueError("optimizer: its state in the file is damaged") from error
    if own != saved:
        raise ValueError(
            f"optimizer: the file is of another one, with {saved} parameters in its groups where "
            f"this one has {own}"
        )


def _check_version(content: Mapping[str, Any], what: str) -> None:
    if content.get("version") != VERSION:
        raise ValueError(
            f"{what}: has version {content.get('version')!r} of the format, this release reads "
            f"{VERSION}"
        )


def _check_plain(value: object, name: str) -> None:
    """Tensors and plain Python, all the way down."""
    if isinstance(value, Mapping) and type(value) is dict:
        for key, item in value.items():
            _check_plain(key, name)
            _check_plain(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):  # type: ignore[arg-type]
            _check_plain(item, f"{name}[{number}]")
    elif value is not None and type(value) not in (bool, int, float, str, bytes, Tensor):
        raise TypeError(
            f"{name}: expected tensors and plain Python, got {type(value).__name__}; pass its "
            "state_dict or its numbers instead"
        )


def _is_tensor(value: object, dtype: torch.dtype, size: int) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype and value.shape == (size,)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]

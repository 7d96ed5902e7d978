"""Checkpoints of a run: the model, the optimizer and the pruner in one file, or nothing at all."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
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
#: Flags that optimizers of a newer PyTorch add to the groups of an older one's state themselves.
_FILLED_IN = {
    "capturable", "decoupled_weight_decay", "differentiable", "foreach", "fused", "maximize",
}  # fmt: skip


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
        TypeError: a part is something else, or an extra is what `load_checkpoint` would refuse.
        FileNotFoundError: there is no such folder.
    """
    _check_parts(model, optimizer)
    for name, value in extra.items():
        _check_loads(value, name)
    content = {
        "format": FILE_FORMAT,
        "version": VERSION,
        "model": model.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "pruner": None if pruner is None else pruner.state_dict(),
        "extra": extra,
    }
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {os.fspath(target.parent)!r}")
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
        TypeError: a part is something else.
        ValueError: the file is damaged, not a checkpoint, or of another model, optimizer,
            criterion or set of parts; or the pruner is not of this model and optimizer. Nothing
            has changed.
        RuntimeError: the pruner is closed. Nothing has changed.
    """
    _check_parts(model, optimizer)
    if pruner is not None:
        if pruner.model is not model:
            raise ValueError("pruner: it prunes another model than the one given")
        if optimizer is not None and pruner.optimizer is not optimizer:
            raise ValueError(
                "optimizer: the pruner has another one or none, so this one would keep parameters "
                "that the model drops; build the pruner with Pruner(optimizer=...)"
            )
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
    shapes = {
        name: tuple(value.shape) if isinstance(value, Tensor) else None
        for name, value in model.state_dict().items()
    }
    cut = {} if pruner is None else pruner.shapes_after(content["pruner"])
    _check_model_state(content["model"], shapes | cut)
    if optimizer is not None:
        _check_optimizer_state(content["optimizer"], optimizer)
        if pruner is not None:
            after = {p: cut.get(name, tuple(p.shape)) for name, p in model.named_parameters()}
            _check_state_shapes(content["optimizer"], optimizer, after)

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
            "state: it is of another model, or of other prunable layers; build the pruner of the "
            "same model, as it was at first, with the same arguments"
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
    history = state.get("history")
    if not isinstance(history, list) or not all(map(_is_record, history)):
        return "'history' does not hold records"
    return ""


def _check_model_state(state: Any, shapes: Mapping[str, tuple[int, ...] | None]) -> None:
    if not isinstance(state, Mapping):
        raise ValueError("model: its state in the file is damaged")
    differing = sorted(state.keys() ^ shapes.keys())
    differing += [
        name
        for name in state.keys() & shapes.keys()
        if (tuple(state[name].shape) if isinstance(state[name], Tensor) else None) != shapes[name]
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
        numbers = {number for group in state["param_groups"] for number in group["params"]}
        sound = state["state"].keys() <= numbers and all(
            isinstance(entry, Mapping) for entry in state["state"].values()
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError("optimizer: its state in the file is damaged") from error
    if own != saved:
        raise ValueError(
            f"optimizer: the file is of another one, with {saved} parameters in its groups where "
            f"this one has {own}"
        )
    if not sound:
        raise ValueError("optimizer: its state in the file is damaged")
    for group in state["param_groups"]:
        if lacking := optimizer.defaults.keys() - group.keys() - _FILLED_IN:
            raise ValueError(
                f"optimizer: the file is of another one than {type(optimizer).__name__}, without "
                f"{', '.join(sorted(lacking))}"
            )
    # What else an optimizer needs, it alone knows: a double of it, with the same parameters, tries.
    double = object.__new__(type(optimizer))
    double.__dict__.update(optimizer.__dict__)
    try:
        double.load_state_dict(state)
    except Exception as error:
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} does not take its state in the file "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error


def _check_state_shapes(
    state: Any, optimizer: Optimizer, shapes: Mapping[Any, tuple[int, ...]]
) -> None:
    """State tensors must follow their parameters, or they could not have been cut with them."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in state["state"].get(number, {}).items():
            if parameter not in shapes or not isinstance(value, Tensor) or value.numel() == 1:
                continue
            shape = shapes[parameter]
            if value.dim() != len(shape) and shape == parameter.shape:
                continue  # some optimizers keep tables of their own beside what follows the shape
            if value.dim() != len(shape) or any(
                mine not in (1, theirs) for mine, theirs in zip(value.shape, shape, strict=True)
            ):
                raise ValueError(
                    f"optimizer: its state in the file is damaged ({key!r} of parameter {number} "
                    f"has shape {tuple(value.shape)}, the parameter {shape})"
                )


def _check_version(content: Mapping[str, Any], what: str) -> None:
    if content.get("version") != VERSION:
        raise ValueError(
            f"{what}: has version {content.get('version')!r} of the format, this release reads "
            f"{VERSION}"
        )


def _check_parts(model: object, optimizer: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )


def _check_loads(value: object, name: str) -> None:
    """What torch.load reads back without running code from the file."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, map_location="cpu", weights_only=True)
    except Exception as error:
        # PyTorch says what is wrong at the end of a long explanation.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0]
        raise TypeError(
            f"{name}: expected tensors and plain Python, which torch.load(weights_only=True) "
            f"reads back; pass its state_dict or its numbers instead ({reason})"
        ) from error


def _is_tensor(value: object, dtype: torch.dtype, size: int) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype and value.shape == (size,)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_record(record: object) -> bool:
    if not isinstance(record, dict) or record.keys() != {f.name for f in fields(PruneRecord)}:
        return False
    fits: dict[Any, Callable[[object], bool]] = {
        "int": _is_count,
        "float": lambda value: isinstance(value, float),
        "bool": lambda value: isinstance(value, bool),
    }
    return all(fits.get(f.type, _is_removed)(record[f.name]) for f in fields(PruneRecord))


def _is_removed(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(layer, str) and isinstance(filters, tuple) and all(map(_is_count, filters))
        for layer, filters in value.items()
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]

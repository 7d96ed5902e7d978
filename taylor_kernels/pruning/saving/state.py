"""What a saved state must be before anything takes it on: a pruner's, a model's.

Every check raises a ValueError that says what is wrong, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, TypeGuard

import torch
from torch import Tensor

from taylor_kernels.pruning.records import PruneRecord

PRUNER_FORMAT = "taylor_kernels.Pruner"
#: Of the format of pruners' states and of checkpoint files.
VERSION = 2


def check_version(content: Mapping[str, Any], what: str) -> None:
    """The format of what was saved is of this release.

    Args:
        what: begins the message: the argument, and the file if there is one.

    Raises:
        ValueError: it is not.
    """
    if content.get("version") == 1:
        raise ValueError(
            f"{what}: has version 1 of the format, from a release that found other groups of "
            "filters (by Torch-Pruning); finish the run with that release, or load the model's "
            "weights alone and prune anew"
        )
    if content.get("version") != VERSION:
        raise ValueError(
            f"{what}: has version {content.get('version')!r} of the format, this release reads "
            f"{VERSION}"
        )


def pruner_state(
    structure: list,
    criterion: str,
    masks: Mapping[str, list[Tensor]],
    scores: dict[str, Any],
    steps: int,
    history: Sequence[PruneRecord],
    blocks: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What `check_pruner_state` lets pass."""
    return {
        "format": PRUNER_FORMAT,
        "version": VERSION,
        "criterion": criterion,
        "structure": structure,
        **masks,
        "scores": scores,
        "steps": steps,
        "history": [asdict(record) for record in history],
        **({} if blocks is None else {"blocks": blocks}),
    }


def check_pruner_state(
    state: Any,
    structure: list,
    criterion: str,
    blocks: list[str] | None = None,
    staged: Collection[int] = (),
) -> dict[str, Any]:
    """A state_dict that a pruner with this structure and criterion wrote, or a ValueError.

    Args:
        blocks: the names of the pruner's blocks; None if it has no blocks=True.
        staged: the numbers of groups of stages, which can lose all their units.
    """
    if not isinstance(state, Mapping) or state.get("format") != PRUNER_FORMAT:
        raise ValueError("state: it is not the state_dict of a tk.Pruner")
    check_version(state, "state")
    if state.get("criterion") != criterion:
        raise ValueError(
            f"state: its scores are by {state.get('criterion')!r}, this pruner's by {criterion!r}; "
            "build the pruner with the same one"
        )
    if state.get("structure") != structure:
        raise ValueError(
            "state: it is of another model, or of other prunable layers (or of a release that "
            "found other groups of filters); build the pruner of the same model, as it was at "
            "first, with the same arguments, or go on in the release that began the run"
        )
    saved = state.get("blocks")
    if (saved is None) != (blocks is None):
        given, lack = ("with", "without") if blocks is None else ("without", "with")
        raise ValueError(
            f"state: it is of a pruner {given} blocks=True, this one is {lack} it; build the "
            "pruner with the same arguments"
        )
    state = {**state, "history": _with_blocks(state.get("history"))}
    damage = _damage(state, [group[0][2] for group in structure], staged)
    if not damage and blocks is not None:
        damage = _damage_of_blocks(saved, blocks)
    if damage:
        raise ValueError(f"state: it is damaged ({damage})")
    return dict(state)


def _damage(state: Mapping[str, Any], sizes: list[int], staged: Collection[int]) -> str:
    for name in ("removed", "compacted"):
        masks = state.get(name)
        if not isinstance(masks, list) or len(masks) != len(sizes):
            return f"{name!r} is not a list of {len(sizes)} masks"
        for number, (mask, size) in enumerate(zip(masks, sizes, strict=True)):
            fits = _is_tensor(mask, torch.bool, size)
            if not fits or (mask.all() and number not in staged):
                return f"a mask in {name!r} does not fit its group"
    for off, cut in zip(state["removed"], state["compacted"], strict=True):
        if (cut & ~off).any():
            return "units are compacted that were never removed"
    remaining = sum(int((~mask).sum()) for mask in state["compacted"])
    scores = state.get("scores")
    if not isinstance(scores, dict) or scores.keys() != {"sum", "average", "count"}:
        return "the running scores are missing or not all there"
    if not _is_count(scores["count"]):
        return "the count of the scores is none"
    for name in ("sum", "average"):
        values = scores[name]
        if values is not None and not _is_tensor(values, torch.float64, remaining):
            return f"the {name} of the scores does not fit the units"
    if (scores["count"] > 0) != (scores["sum"] is not None):
        return "the sum of the scores does not fit their count"
    if not _is_count(state.get("steps")):
        return "'steps' is not a count"
    history = state.get("history")
    if not isinstance(history, list) or not all(map(_is_record, history)):
        return "'history' does not hold records"
    return ""


def _with_blocks(history: object) -> object:
    """Records as they are now; those of a release without blocks say nothing of any."""
    if not isinstance(history, list):
        return history
    return [{"blocks": ()} | r if isinstance(r, dict) else r for r in history]


def _damage_of_blocks(saved: Any, names: list[str]) -> str:
    if not isinstance(saved, Mapping) or saved.get("names") != names:
        return "its residual blocks are others"
    removed, compacted = saved.get("removed"), saved.get("compacted")
    if not (_is_masks(removed, len(names)) and _is_masks(compacted, len(names))):
        return "the masks of blocks do not fit them"
    if (compacted & ~removed).any():
        return "blocks are compacted that were never removed"
    scores = saved.get("scores")
    if not isinstance(scores, dict) or scores.keys() != {"sum", "average", "count"}:
        return "the running scores of blocks are missing or not all there"
    for name in ("sum", "average"):
        if scores[name] is not None and not _is_tensor(scores[name], torch.float64, len(names)):
            return f"the {name} of the scores of blocks does not fit them"
    if not _is_count(scores["count"]) or (scores["count"] > 0) != (scores["sum"] is not None):
        return "the count of the scores of blocks does not fit their sum"
    return ""


def check_model_state(state: Any, shapes: Mapping[str, tuple[int, ...] | None]) -> None:
    """A saved state has the names and shapes of a model's.

    Args:
        shapes: name -> shape; None for what is no tensor.

    Raises:
        ValueError: it has not, or is no mapping.
    """
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


def _is_tensor(value: object, dtype: torch.dtype, size: int) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype and value.shape == (size,)


def _is_masks(value: object, size: int) -> TypeGuard[Tensor]:
    return _is_tensor(value, torch.bool, size)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_record(record: object) -> bool:
    if not isinstance(record, dict) or record.keys() != {f.name for f in fields(PruneRecord)}:
        return False
    fits: dict[Any, Callable[[object], bool]] = {
        "int": _is_count,
        "float": lambda value: isinstance(value, float),
        "bool": lambda value: isinstance(value, bool),
        "tuple[str, ...]": lambda value: (
            isinstance(value, tuple) and all(isinstance(name, str) for name in value)
        ),
    }
    return all(fits.get(f.type, _is_removed)(record[f.name]) for f in fields(PruneRecord))


def _is_removed(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(layer, str) and isinstance(filters, tuple) and all(map(_is_count, filters))
        for layer, filters in value.items()
    )


def first_line(error: BaseException) -> str:
    """What an error says first, of at most 160 characters; its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]

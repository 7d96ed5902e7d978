"""Tensors and plain Python: what a file can hold that torch.load reads without running code."""

from __future__ import annotations

import copy
import io
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LEAVES = {
    bool, bytes, complex, float, int, str, type(None), Tensor, nn.Parameter,
    torch.Size, torch.device, torch.dtype,
}  # fmt: skip


def as_plain(value: Any, part: str, place: str = "") -> Any:
    """A value with Python's numbers in place of numpy's; itself if it has none.

    Args:
        part: what to call the whole in errors.
        place: where in it the value is.

    Raises:
        TypeError: something else is in it, which torch.load(weights_only=True) would refuse.
    """
    kind = type(value)
    if kind in _LEAVES:
        return value
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        return as_plain(value.item(), part, place)
    if kind in (dict, OrderedDict, Counter):
        pairs = [
            (as_plain(key, part, place), as_plain(inner, part, f"{place}[{key!r}]"))
            for key, inner in value.items()
        ]
        if all(
            key is mine and inner is own
            for (key, inner), (mine, own) in zip(pairs, value.items(), strict=True)
        ):
            return value
        new = copy.copy(value)  # with its attributes: a state_dict of a model has versions there
        new.clear()
        for key, inner in pairs:
            new[key] = inner
        return new
    if kind in (list, tuple):
        inside = [as_plain(inner, part, f"{place}[{i}]") for i, inner in enumerate(value)]
        same = all(new is old for new, old in zip(inside, value, strict=True))
        return value if same else kind(inside)
    _check_loads(value, part, place)
    return value


def _check_loads(value: object, part: str, place: str) -> None:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, map_location="cpu", weights_only=True)
    except Exception as error:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        where = f"it{place} is" if place else "got"
        raise TypeError(
            f"{part}: expected tensors and plain Python, which torch.load(weights_only=True) "
            f"reads back, but {where} a {kind}; keep its state_dict or its numbers instead"
        ) from error

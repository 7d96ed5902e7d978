"""What goes with the channels of a group: parts of parameters, and where they belong in its root.

An item of a Torch-Pruning group names a layer, a pruning function, the channels of the layer and,
one by one, the channels of the group's root that they go with (`root_idxs`). Most of these lists
count up, so that they are slices: comparing a list with one that counts up is much cheaper than
making a tensor of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_COUNTING: list[int] = []

#: A slice where channels count up by one, else their numbers.
Places = slice | Tensor


class Part(NamedTuple):
    """Some rows (axis 0) or columns (axis 1) of a parameter, as `filter_moments` counts them."""

    module: nn.Module
    name: str  # of the parameter in the module
    axis: int
    idxs: Sequence[int]
    root_idxs: Sequence[int | None]

    @property
    def parameter(self) -> nn.Parameter:
        parameter: nn.Parameter = getattr(self.module, self.name)
        return parameter


def places(idxs: Sequence[int]) -> Places:
    """Where numbers lie: a slice if they count up."""
    return slice(idxs[0], idxs[0] + len(idxs)) if _counts_up(idxs) else torch.tensor(idxs)


def _counts_up(idxs: Sequence[int | None]) -> bool:
    first, last, count = idxs[0], idxs[-1], len(idxs)
    if first is None or last is None or last - first != count - 1:
        return False
    if len(_COUNTING) < first + count:
        _COUNTING.extend(range(len(_COUNTING), first + count))
    return idxs == _COUNTING[first : first + count]


def is_one_of(module: object, types: Sequence[type[nn.Module]]) -> bool:
    """Whether a module is of one of an importance's target types."""
    return isinstance(module, tuple(types))


def is_into(handler: Any) -> bool:
    """Whether a pruning function takes input channels away."""
    return handler.__name__.endswith("in_channels")


def parts_of(group: Any, target_types: Sequence[type[nn.Module]], bias: bool) -> Iterator[Part]:
    """All parts of parameters that go with the channels of a group, each once.

    A weight that two layers share is one parameter, and is counted once.
    """
    met: dict[tuple[int, int], Sequence[int]] = {}
    for item in group:
        module = item.dep.target.module
        if not is_one_of(module, target_types) or not len(item.idxs):
            continue
        for part in _parts(module, item, bias):
            key = id(part.parameter), part.axis
            if key not in met or met[key] != part.idxs:
                met[key] = part.idxs
                yield part


def _parts(module: nn.Module, item: Any, bias: bool) -> Iterator[Part]:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    into = isinstance(module, (_ConvNd, nn.Linear)) and is_into(item.dep.handler)
    yield Part(module, "weight", weight_axis(module, into), item.idxs, item.root_idxs)
    of_bias = getattr(module, "bias", None)
    if bias and not into and isinstance(of_bias, Tensor):
        axis = 1 if of_bias.dim() > 1 else 0
        yield Part(module, "bias", axis, item.idxs, item.root_idxs)


def weight_axis(module: nn.Module, into: bool) -> int:
    """Whether the channels of a module are rows or columns of its weight.

    A norm over several dimensions has them last, as has an embedding.
    """
    if isinstance(module, _ConvTransposeNd):
        return 0 if into else 1
    if isinstance(module, (_ConvNd, nn.Linear)):
        return 1 if into else 0
    weight: Any = module.weight
    return 1 if weight.dim() > 1 else 0


def root_size(group: Any) -> int:
    """How many channels a group's score is for."""
    return len(group[0].idxs)


class Roots:
    """From channels of the root to places in its score; parts of one item ask for the same.

    They are the same where a group has all of its root's channels; of a group of channels 2, 6 and
    9 these are the places 0, 1 and 2.
    """

    def __init__(self, group: Any) -> None:
        roots = group[0].root_idxs
        self._at: dict[int, int] | None = None
        self._last: tuple[object, Places | None] = (None, None)
        whole = places(roots)
        if not isinstance(whole, slice) or whole.start:
            self._at = {root: i for i, root in enumerate(roots)}

    def __call__(self, roots: Sequence[int | None]) -> Places | None:
        """None where a channel goes with none of the root's."""
        if self._last[0] is not roots:
            self._last = roots, self._find(roots)
        return self._last[1]

    def _find(self, roots: Sequence[int | None]) -> Places | None:
        if self._at is None and _counts_up(roots):
            return slice(roots[0], roots[0] + len(roots))  # type: ignore[operator]
        if None in roots:
            return None
        at = self._at
        return places([r if at is None else at[r] for r in roots])  # type: ignore[index,misc]


def add_at(total: Tensor, at: Places, values: Tensor) -> None:
    """total[at] += values, where a place may occur several times."""
    if isinstance(at, slice):
        total[at] += values
    else:
        total.index_add_(0, at, values)

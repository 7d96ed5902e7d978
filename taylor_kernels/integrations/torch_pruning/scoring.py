"""How the score of a group is made of the sums over its parts, here and in Torch-Pruning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch_pruning.pruner import function

from taylor_kernels.integrations.torch_pruning.parts import (
    Part,
    Places,
    Roots,
    add_at,
    is_one_of,
    parts_of,
    places,
    root_size,
    weight_axis,
)

#: A part's values, and the channels of the root that they belong to.
Found = tuple[Tensor, Sequence["int | None"]]

_OUT = (function.prune_conv_out_channels, function.prune_linear_out_channels)
_INTO = (function.prune_conv_in_channels, function.prune_linear_in_channels)


class SweptGroups:
    """Adds to a Torch-Pruning importance: scores of groups from sums over a whole model.

    A subclass sets `_sweep`, `strict_compat`, and what Torch-Pruning's constructors set.
    """

    _sweep: Any
    strict_compat: bool
    target_types: Sequence[type[nn.Module]]
    group_reduction: Any
    normalizer: Any
    bias: bool

    #: The pruning functions of vectors that Torch-Pruning's own class counts.
    _strict_norms: tuple[Any, ...] = ()

    def _value(self, table: Tensor) -> Tensor:
        """From the sums of a part to its scores."""
        return table

    def _score(self, group: Any) -> Tensor | None:
        """The score of a group from everything that goes with its channels."""
        parts = list(parts_of(group, self.target_types, self.bias))
        tables = self._tables(group, parts)
        pick = Pick()
        found = [
            (pick(self._value(table), part.idxs), part.root_idxs)
            for part, table in zip(parts, tables, strict=True)
            if table is not None
        ]
        if not found:
            return None
        return self._normalize(self._reduced(group, found), self.normalizer)  # type: ignore[attr-defined]

    def _tables(self, group: Any, parts: Sequence[Part]) -> list[Tensor | None]:
        return self._sweep.find(parts, lambda: self._modules(group))

    def _modules(self, group: Any) -> Iterator[nn.Module]:
        graph = group._DG
        modules = [] if graph is None else graph.model.modules()
        return (module for module in modules if is_one_of(module, self.target_types))

    def _reduced(self, group: Any, found: Sequence[Found]) -> Tensor:
        """One vector of all parts, by `group_reduction`."""
        if self.group_reduction not in ("mean", "sum"):
            return self._reduce(*map(list, zip(*found, strict=True)))  # type: ignore[attr-defined]
        total, at, count = torch.zeros(root_size(group)), Roots(group), 0
        for values, root_idxs in found:
            where = at(root_idxs)
            if where is not None:
                add_at(total, where, values)
                count += 1
        return total / count if self.group_reduction == "mean" else total

    def _strict_score(self, group: Any) -> Tensor | None:
        """Torch-Pruning's own score, or NotImplemented where its own code is to find it.

        As there, the channels of an item are sorted in place, and those of the root are not.
        """
        parts: list[tuple[Part, int]] = []
        for item in group:
            item.idxs.sort()
            layer, handler = item.dep.target.module, item.dep.handler
            if not is_one_of(layer, self.target_types):
                continue
            counted = list(self._strict_parts(layer, handler, item))
            for part, repeat in counted:
                if repeat < 1 or not _is_plain(part.parameter):
                    return NotImplemented
            parts += counted
        if not parts:
            return None
        tables = self._tables(group, [part for part, _ in parts])
        found: list[Found] = []
        pick = Pick()
        for (part, repeat), table in zip(parts, tables, strict=True):
            if table is None:
                return NotImplemented
            if repeat > 1:  # its sums go over all groups, and are repeated
                table = table.view(repeat, -1).sum(0).repeat(repeat)
            found.append((pick(self._value(table), part.idxs), part.root_idxs))
        size = len(found[0][0])
        if size != root_size(group) or len(group[0].root_idxs) != size:
            reduced = self._reduce(*map(list, zip(*found, strict=True)))  # type: ignore[attr-defined]
        else:
            reduced = self._reduced(group, found)
        return self._normalize(reduced, self.normalizer)  # type: ignore[attr-defined]

    def _strict_parts(self, layer: Any, handler: Any, item: Any) -> Iterable[tuple[Part, int]]:
        """The parts that Torch-Pruning counts, and how many groups it adds up (0: its own code)."""

        def part(name: str, axis: int) -> Part:
            return Part(layer, name, axis, item.idxs, item.root_idxs)

        if handler in _OUT or handler in _INTO:
            into = handler in _INTO
            groups = layer.groups if isinstance(layer, _ConvNd) else 1
            repeat = groups if into else 1
            if groups > 1 and (getattr(layer, "transposed", False) or layer.in_channels == groups):
                repeat = 0
            yield part("weight", weight_axis(layer, into)), repeat
            if into:
                return
        elif handler in self._strict_norms:
            if layer.weight is None:
                return
            yield part("weight", 0), int(layer.weight.dim() == 1)
        else:
            return
        if self.bias and layer.bias is not None:
            yield part("bias", 0), 1


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether sums in float32 are what Torch-Pruning finds."""
    return parameter.dtype in (torch.float32, torch.float64)


class Pick:
    """Values of some channels; parts of one item ask for the same."""

    def __init__(self) -> None:
        self._last: tuple[object, Places] = (None, slice(0))

    def __call__(self, table: Tensor, idxs: Sequence[int]) -> Tensor:
        if self._last[0] is not idxs:
            self._last = idxs, places(idxs) if idxs else slice(0)
        return table[self._last[1]]

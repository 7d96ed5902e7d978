"""Sums over every row and column of a model's parameters, from one launch, kept while they hold."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from taylor_kernels.integrations.torch_pruning.parts import Part
from taylor_kernels.ops.filter_moments import MOMENTS, needed_moments

#: What goes with a parameter's values: its gradient, or its gradient's mean square.
Source = Callable[[nn.Parameter], "Tensor | None"]


class _Mark(NamedTuple):
    """Which tensor it was, and in which state: not the tensor itself, which may go."""

    tensor: weakref.ref[Tensor]
    version: int
    address: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Mark:
        return cls(weakref.ref(tensor), tensor._version, tensor.data_ptr())

    def holds_for(self, tensor: Tensor) -> bool:
        same = self.tensor() is tensor and self.version == tensor._version
        return same and self.address == tensor.data_ptr()


class _Entry(NamedTuple):
    parameter: _Mark
    source: _Mark
    tables: tuple[Tensor, Tensor]  # of rows, and of columns


class Sweep:
    """Σ s·w, Σ |s·w| or Σ s·w² for all rows and columns of all parameters of a model.

    All are computed when the first is asked for, by one call of `filter_moments`, and copied to the
    host at once. A table is handed out only while its parameter and its source are the tensors that
    they were, in the state in which they were (PyTorch counts changes in place); otherwise
    everything is computed anew.

    Args:
        source: gives s of a parameter, or None.
        moment: the column of `MOMENTS` that is wanted.
        squared: the weights are squared first.
    """

    def __init__(self, source: Source, moment: str, *, squared: bool = False) -> None:
        self._source = source
        self._column = MOMENTS.index(moment)
        self._squared = squared
        self._entries: dict[int, _Entry] = {}
        self.launches = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy finds its own tables."""
        return {**vars(self), "_entries": {}}

    @property
    def found_any(self) -> bool:
        """Whether any parameter had a source in the last launch."""
        return bool(self._entries)

    def find(
        self, parts: Sequence[Part], modules: Callable[[], Iterable[nn.Module]]
    ) -> list[Tensor | None]:
        """The table of each part on the host, None where its parameter has no source.

        Args:
            modules: those whose parameters a launch reads along, weight and bias.
        """
        if not all(self._is_current(part.parameter) for part in parts):
            self._launch([part.module for part in parts], modules())
        found = [self._entries.get(id(part.parameter)) for part in parts]
        return [e and e.tables[part.axis] for e, part in zip(found, parts, strict=True)]

    def _is_current(self, parameter: nn.Parameter) -> bool:
        source, entry = self._source(parameter), self._entries.get(id(parameter))
        if source is None:
            return entry is None
        return (
            entry is not None
            and entry.parameter.holds_for(parameter)
            and entry.source.holds_for(source)
        )

    @torch.no_grad()
    def _launch(self, first: Iterable[nn.Module], rest: Iterable[nn.Module]) -> None:
        self._entries = {}
        self.launches += 1
        found: dict[int, tuple[nn.Parameter, Tensor, int]] = {}
        for module in (*first, *rest):
            groups = module.groups if isinstance(module, _ConvNd) else 1
            for name in ("weight", "bias"):
                parameter = getattr(module, name, None)
                if not isinstance(parameter, nn.Parameter) or id(parameter) in found:
                    continue
                source = self._source(parameter)
                if source is not None and 1 <= parameter.dim() <= 5:
                    of = groups if name == "weight" else 1
                    found[id(parameter)] = parameter, source, of
        if not found:
            return
        tables = self._tables(list(found.values()))
        for key, (parameter, source, _), rows, columns in zip(
            found, found.values(), *tables, strict=True
        ):
            self._entries[key] = _Entry(_Mark.of(parameter), _Mark.of(source), (rows, columns))

    def _tables(
        self, found: Sequence[tuple[nn.Parameter, Tensor, int]]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        weights = [_as_matrix(parameter.detach()) for parameter, _, _ in found]
        sources = [
            _as_matrix(source.detach()).to(weight.dtype)
            for weight, (_, source, _) in zip(weights, found, strict=True)
        ]
        if self._squared:
            weights = list(torch._foreach_mul(weights, weights))
        both = needed_moments(
            weights,
            sources,
            dim=(0, 1),
            groups=[groups for _, _, groups in found],
            moments=(MOMENTS[self._column],),
        )
        rows, columns = both
        tables = [table[:, self._column] for table in (*rows, *columns)]
        host: list[Tensor] = [torch.empty(0)] * len(tables)
        for device in {table.device for table in tables}:
            here = [i for i, table in enumerate(tables) if table.device == device]
            packed = torch.cat([tables[i].float() for i in here]).cpu()
            for i, table in zip(here, packed.split([len(tables[i]) for i in here]), strict=True):
                host[i] = table
        return host[: len(found)], host[len(found) :]


def _as_matrix(tensor: Tensor) -> Tensor:
    """A vector as a column; what a norm over several dimensions has, with the last as columns."""
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    return tensor.unsqueeze(1) if tensor.dim() == 1 else tensor

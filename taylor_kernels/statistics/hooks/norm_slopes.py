"""Slopes of gates behind norms, from the gradients of scale and shift: γ g_γ + β g_β."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from taylor_kernels.ops.filter_moments import needed_moments
from taylor_kernels.statistics.hooks.gate_tables import Packed


@dataclass(eq=False, slots=True)
class _Read:
    """The parameters of a norm, and what has come for each."""

    scale: nn.Parameter
    shift: nn.Parameter
    of_scale: list[Tensor]
    of_shift: list[Tensor]
    channels: int

    def is_held(self, norm: _NormBase) -> bool:
        """Whether these are the norm's parameters now."""
        held = norm._parameters
        return held.get("weight") is self.scale and held.get("bias") is self.shift


class _Table(NamedTuple):
    """What is read together of some norms: their names, and how many channels each has; all scales,
    then all shifts, and where the gradients of these come."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    parameters: list[Tensor]
    found: list[list[Tensor]]


class NormSlopes:
    """The gradients of norms' scales and shifts as they come in backward().

    A gradient is put aside as autograd hands it over. As long as it is held here, autograd makes no
    `.grad` of it, but of a copy, so that what is done to `.grad` does not matter.

    Args:
        handles: where those of the hooks go.
    """

    def __init__(self, handles: list[Any], backend: str | None) -> None:
        self._handles, self._backend = handles, backend
        self._found: dict[nn.Parameter, list[Tensor]] = {}
        self._hooks: dict[nn.Parameter, RemovableHandle] = {}
        # More than one of a norm that torch.func.functional_call lends others for a pass.
        self._read: dict[_NormBase, list[_Read]] = {}
        # What `take` read last, each with its kind, and how: it is most often the same.
        self._come: list[tuple[str, _Read, torch.device, torch.dtype]] = []
        self._tables: list[_Table] = []

    def watch(self, norm: _NormBase) -> None:
        """Put aside what comes for this norm, with the parameters that it has, from now on."""
        reads = self._read.setdefault(norm, [])
        if any(read.is_held(norm) for read in reads):
            return
        for parameter in (norm.weight, norm.bias):
            if parameter not in self._found:
                # The hook is the list's own method: no line of Python runs between two layers.
                found = self._found[parameter] = []
                self._hooks[parameter] = parameter.register_hook(found.append)
                self._handles.append(self._hooks[parameter])
        scale, shift = norm.weight, norm.bias
        of_scale, of_shift = self._found[scale], self._found[shift]
        reads.append(_Read(scale, shift, of_scale, of_shift, scale.numel()))

    def is_settled(self, norm: _NormBase) -> bool:
        """Whether it has had no parameters but those that it has now, since the last update."""
        return all(read.is_held(norm) for read in self._read[norm])

    def count(self) -> int:
        """How many gradients have come, and are not added up yet."""
        return sum(map(len, self._found.values()))

    def add_up(self) -> None:
        """Keep the sum of what has come for each parameter, and no more."""
        if max(map(len, self._found.values()), default=0) <= 1:
            return
        for found in self._found.values():
            if len(found) > 1:
                found[:] = [reduce(add, (grad.detach() for grad in found))]

    def take(self, norms: Mapping[_NormBase, str]) -> Iterator[Packed]:
        """The slopes of these norms by their names, if gradients have come of both parameters."""
        self.add_up()
        come = [
            (name, read, read.scale.device, read.scale.dtype)
            for norm, name in norms.items()
            for read in self._read[norm]
            if read.of_scale and read.of_shift
        ]
        if come != self._come:
            self._come, self._tables = come, _tables(come)
        for names, sizes, parameters, found in self._tables:
            grads = [grad for (grad,) in found]
            table = needed_moments(
                parameters, grads, moments=("gw",), packed=True, backend=self._backend
            )
            of_scales, of_shifts = table[:, 0].chunk(2)
            yield Packed(names, sizes, of_scales + of_shifts)

    def forget(self) -> None:
        """Forget what has come, and parameters that norms had for a while."""
        for found in self._found.values():
            found.clear()
        several = [norm for norm, reads in self._read.items() if len(reads) > 1]
        for norm in several:
            reads = self._read[norm]
            reads[:] = [read for read in reads if read.is_held(norm)]
        if several:
            self._drop_others()

    def _drop_others(self) -> None:
        reads = [read for some in self._read.values() for read in some]
        wanted = {one for read in reads for one in (read.scale, read.shift)}
        for parameter in [one for one in self._found if one not in wanted]:
            del self._found[parameter]
            hook = self._hooks.pop(parameter)
            hook.remove()
            self._handles.remove(hook)
        self._come, self._tables = [], []  # which hold on to them


def _tables(come: Iterable[tuple[str, _Read, torch.device, torch.dtype]]) -> list[_Table]:
    """What can be read in one call: norms whose parameters are of one kind."""
    alike: dict[object, list[tuple[str, _Read]]] = {}
    for name, read, *kind in come:
        alike.setdefault(tuple(kind), []).append((name, read))
    tables = []
    for some in alike.values():
        names, reads = zip(*some, strict=True)
        parameters = [read.scale for read in reads] + [read.shift for read in reads]
        found = [read.of_scale for read in reads] + [read.of_shift for read in reads]
        tables.append(_Table(names, tuple(read.channels for read in reads), parameters, found))
    return tables

"""Slopes of gates behind norms, from the gradients of scale and shift: γ g_γ + β g_β."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from taylor_kernels.ops.filter_moments import needed_moments
from taylor_kernels.statistics.hooks.gate_tables import Packed


class _Read(NamedTuple):
    """The parameters of a norm, and what has come for each."""

    scale: nn.Parameter
    shift: nn.Parameter
    of_scale: list[Tensor]
    of_shift: list[Tensor]
    channels: int

    def is_whole(self, norm: _NormBase) -> bool:
        """Whether gradients have come of both, and the norm has them still."""
        held = norm._parameters
        here = held.get("weight") is self.scale and held.get("bias") is self.shift
        return here and bool(self.of_scale) and bool(self.of_shift)


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
        self._read: dict[_NormBase, _Read] = {}

    def watch(self, norm: _NormBase) -> None:
        """Put aside what comes for this norm from now on."""
        known = self._read.get(norm)
        if known is not None and known.scale is norm.weight and known.shift is norm.bias:
            return
        for parameter in (norm.weight, norm.bias):
            if parameter not in self._found:
                # The hook is the list's own method: no line of Python runs between two layers.
                found = self._found[parameter] = []
                self._handles.append(parameter.register_hook(found.append))
        scale, shift = norm.weight, norm.bias
        of_scale, of_shift = self._found[scale], self._found[shift]
        self._read[norm] = _Read(scale, shift, of_scale, of_shift, scale.numel())

    def count(self) -> int:
        """How many gradients have come, and are not added up yet."""
        return sum(map(len, self._found.values()))

    def add_up(self) -> None:
        """Keep the sum of what has come for each parameter, and no more."""
        for found in self._found.values():
            if len(found) > 1:
                found[:] = [reduce(add, (grad.detach() for grad in found))]

    def take(self, norms: Mapping[_NormBase, str]) -> Iterator[Packed]:
        """The slopes of these norms by their names, if gradients have come of both parameters."""
        self.add_up()
        alike: dict[object, list[tuple[str, _Read]]] = {}  # those that fit into one table
        for norm, name in norms.items():
            read = self._read[norm]
            if read.is_whole(norm):
                alike.setdefault((read.scale.device, read.scale.dtype), []).append((name, read))
        for some in alike.values():
            names, reads = zip(*some, strict=True)
            sizes = tuple(read.channels for read in reads)
            yield Packed(names, sizes, self._slopes(reads))

    def _slopes(self, reads: Sequence[_Read]) -> Tensor:
        scales, shifts = [read.scale for read in reads], [read.shift for read in reads]
        grads = [read.of_scale[0] for read in reads] + [read.of_shift[0] for read in reads]
        table = needed_moments(
            scales + shifts, grads, moments=("gw",), packed=True, backend=self._backend
        )
        of_scales, of_shifts = table[:, 0].chunk(2)
        return of_scales + of_shifts

    def forget(self) -> None:
        """Forget what has come."""
        for found in self._found.values():
            found.clear()

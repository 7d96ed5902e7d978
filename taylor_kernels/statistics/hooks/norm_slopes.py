"""Slopes of gates behind norms, from the gradients of scale and shift: γ g_γ + β g_β."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from operator import add
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from taylor_kernels.layout import accumulator
from taylor_kernels.ops.filter_moments import needed_moments


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

    def watch(self, norm: _NormBase) -> None:
        """Put aside what comes for this norm from now on."""
        for parameter in (norm.weight, norm.bias):
            if parameter not in self._found:
                # The hook is the list's own method: no line of Python runs between two layers.
                found = self._found[parameter] = []
                self._handles.append(parameter.register_hook(found.append))

    def count(self) -> int:
        """How many gradients have come, and are not added up yet."""
        return sum(map(len, self._found.values()))

    def add_up(self) -> None:
        """Keep the sum of what has come for each parameter, and no more."""
        for found in self._found.values():
            if len(found) > 1:
                found[:] = [reduce(add, (grad.detach() for grad in found))]

    def take(self, norms: Mapping[_NormBase, str]) -> Iterator[tuple[str, Tensor]]:
        """(name, slopes [C]) of these norms, if gradients have come of both parameters."""
        self.add_up()
        both = [norm for norm in norms if self._has(norm.weight) and self._has(norm.bias)]
        alike: dict[object, list[_NormBase]] = {}  # those whose moments fit into one table
        for norm in both:
            kind = norm.weight.device, accumulator(norm.weight.dtype)
            alike.setdefault(kind, []).append(norm)
        for some in alike.values():
            yield from zip((norms[norm] for norm in some), self._slopes(some), strict=True)

    def _has(self, parameter: nn.Parameter) -> bool:
        return bool(self._found.get(parameter))

    def _slopes(self, norms: Iterable[_NormBase]) -> tuple[Tensor, ...]:
        scales, shifts = [norm.weight for norm in norms], [norm.bias for norm in norms]
        parameters = [*scales, *shifts]
        table = needed_moments(
            parameters,
            [self._found[parameter][0] for parameter in parameters],
            moments=("gw",),
            packed=True,
            backend=self._backend,
        )
        of_scales, of_shifts = table[:, 0].chunk(2)
        return (of_scales + of_shifts).split([scale.numel() for scale in scales])

    def forget(self) -> None:
        """Forget what has come."""
        for found in self._found.values():
            found.clear()

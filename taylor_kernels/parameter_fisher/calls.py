"""Calls of a model: what its parameters were used for, until gradients come and are reduced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from taylor_kernels.parameter_fisher.kinds import Kind, summed_squares
from taylor_kernels.parameter_fisher.rerun import Rerun
from taylor_kernels.statistics.base import version_of

#: Takes (parameter's name, Σ_n g_n² of a call).
Receive = Callable[[str, Tensor], None]


class Use:
    """One use of a module of a known kind: its input, waiting for the gradient of its output.

    Where several backward passes are made at once, examples of each follow those of the one before.
    """

    def __init__(self, module: str, kinds: Mapping[str, Kind], input: Tensor) -> None:
        self.kinds = kinds  # by the parameter's name in the model
        self.dy: Tensor | None = None
        self.freed = False  # no further gradient can come
        self._module = module
        self._passes = 1  # of which `dy` holds the gradients
        self._input: Tensor | None = input.detach()
        self._version = version_of(input)
        self._open = set(kinds)

    def add(self, dy: Tensor, *, kept: bool) -> None:
        """A gradient has come; those of several backward passes add up."""
        if self._input is None:
            raise RuntimeError(f"{self._module}: backward() ran twice over a graph it had freed")
        self.dy = dy.detach() if self.dy is None else self.dy + dy.detach()
        self.freed = not kept

    def add_passes(self, dy: Tensor) -> None:
        """[passes, N, ...] have come at once, of a graph that is kept."""
        self.add(dy.flatten(0, 1), kept=True)
        self._passes = dy.size(0)

    def take(self) -> tuple[Tensor, Tensor]:
        """The input, once for each pass, and the gradient so far.

        Raises:
            RuntimeError: the input was changed in place since.
        """
        assert self._input is not None
        assert self.dy is not None
        if version_of(self._input) != self._version:
            raise RuntimeError(
                f"{self._module}: its input was changed in place between the forward and the "
                "backward pass, and its values are gone; do that out of place (without "
                "inplace=True)"
            )
        if self._passes == 1:
            return self._input, self.dy
        return self._input.expand(self._passes, *self._input.shape).flatten(0, 1), self.dy

    def done(self, name: str) -> None:
        """A parameter has had what it needs of it; when all have, it is let go."""
        self._open.discard(name)
        if not self._open:
            self.clear()

    def clear(self) -> None:
        """Forget the gradient, and the input if no other can come."""
        self.dy, self._passes = None, 1
        self._open = set(self.kinds)
        if self.freed:
            self._input = None


class RerunUse(NamedTuple):
    """One call of a module that is to be run again for some of its parameters."""

    rerun: Rerun
    parameters: dict[str, tuple[str, nn.Parameter]]  # by its name in the model: its name here


class Call:
    """One call of the model.

    A parameter's gradients of all its uses add up before they are squared. When those of one whose
    uses are of known kinds are there, it is reduced at once, and what it held is let go.

    Args:
        examples: how many it was given.
        separate: every backward pass over its graph is squared by itself.
        own: a closure of the meter runs it, so that other gradients than the meter's do not count.
    """

    def __init__(self, examples: int, *, separate: bool, own: bool) -> None:
        self.examples = examples
        self.separate = separate
        self.own = own
        self.uses: dict[str, list[Use]] = {}
        #: How often the modules of some parameters were given something else than its examples.
        self.uses_elsewhere: dict[str, int] = {}
        self.reruns: list[RerunUse] = []
        #: Parameters with a use that is not of a known kind, and so wait for `reduce_all`.
        self.awaiting: set[str] = set()
        self._all: list[Use] = []

    def add(self, use: Use) -> None:
        """A module was used."""
        self._all.append(use)
        for name in use.kinds:
            self.uses.setdefault(name, []).append(use)

    def add_rerun(self, use: RerunUse) -> None:
        """A module was called that is to be run again."""
        self.reruns.append(use)
        self.awaiting.update(use.parameters)

    def leave_to(self, use: RerunUse) -> None:
        """A module is to be run again for parameters that were noted otherwise until now."""
        for name in use.parameters:
            self.uses.pop(name, None)
            for other in self.reruns:
                other.parameters.pop(name, None)
        self.add_rerun(use)

    def arrived(self, use: Use, backend: str | None, receive: Receive) -> None:
        """A gradient has come at a use: reduce what is complete by it."""
        for name in use.kinds:
            uses = self.uses.get(name, [])
            final = uses and all(u.dy is not None and (u.freed or self.separate) for u in uses)
            if final and name not in self.awaiting:
                self._reduce(name, backend, receive)

    @torch.no_grad()
    def reduce_all(self, backend: str | None, receive: Receive) -> None:
        """Reduce whatever has a gradient that was not reduced yet."""
        if any(use.rerun.reached for use in self.reruns):
            self._reduce_reruns(receive)
        for name, uses in self.uses.items():
            if name not in self.awaiting and any(u.dy is not None for u in uses):
                self._reduce(name, backend, receive)
        self.clear()

    def clear(self) -> None:
        """Forget the gradients that have come."""
        for use in self._all:
            if use.dy is not None:
                use.clear()
        for rerun, _ in self.reruns:
            rerun.clear()

    @torch.no_grad()
    def _reduce(self, name: str, backend: str | None, receive: Receive) -> None:
        uses = [use for use in self.uses[name] if use.dy is not None]
        receive(name, summed_squares([(u.kinds[name], u.take()) for u in uses], backend))
        for use in uses:
            use.done(name)

    def _reduce_reruns(self, receive: Receive) -> None:
        """The parameters that were awaiting it, example by example."""
        totals: dict[str, Tensor] = {}
        for n in range(self.examples):
            gradients: dict[str, Tensor] = {}
            for rerun, parameters in self.reruns:
                if not rerun.reached:
                    continue
                found = rerun.gradients(dict(parameters.values()), n)
                for name, (local, _) in parameters.items():
                    if local in found:
                        gradients[name] = gradients.get(name, 0) + _widened(found[local])
            for name in self.awaiting:
                for use in self.uses.get(name, []):
                    if use.dy is not None:
                        x, dy = use.take()
                        every = slice(n, None, self.examples)  # of this example, all passes
                        own = use.kinds[name].gradients((x[every], dy[every]))
                        gradients[name] = gradients.get(name, 0) + own
            for name, gradient in gradients.items():
                totals[name] = totals.get(name, 0) + gradient.square().sum(0)
        for name, total in totals.items():
            receive(name, total)


def _widened(gradient: Tensor) -> Tensor:
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))

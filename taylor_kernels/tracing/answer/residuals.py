"""Residual blocks, read off a trace: where they are, and what of the model goes with one.

A residual block is an addition of a tensor x and of what a branch of layers has made of x. Of
nested ones the inner are taken. Without the branch x alone is left, so a block can go if

- modules of the model hold all of the branch: those that run inside of it and nowhere else. One of
  them gives the branch's output, behind which are only operations that a factor passes through.
- nothing else reads what the branch makes, and no parameter of it is shared with the rest.

Removal puts modules without parameters in their places. Where a module is nothing but the block,
and without its branch nothing but x, it becomes the identity. Otherwise the modules of the branch
return zeros of the shape of what they are given, so that the code around them runs as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from taylor_kernels.tracing.answer.value_graph import ValueGraph
from taylor_kernels.tracing.blocks import Block, Place
from taylor_kernels.tracing.notes.values import ModuleCall, Values

#: Modules whose output is their weight times something, plus their bias.
_AFFINE = (nn.Linear, _ConvNd, _NormBase, nn.LayerNorm, nn.GroupNorm)


def find_blocks(
    values: Values, model: nn.Module, layers: Collection[str]
) -> tuple[list[Block], dict[str, str]]:
    """The residual blocks of a traced model, and the sums that are none: module -> why.

    Args:
        layers: names of the layers; a branch without any is none.
    """
    return _Finder(values, model, layers).find()


def _sums(marks: Iterable[bool]) -> list[int]:
    """How many of the marks in front of each place are set."""
    return [0, *itertools.accumulate(map(int, marks))]


class _NoBlock(Exception):
    """Why a sum of a tensor and of what was made of it is no block that can go."""


class _Finder:
    def __init__(self, values: Values, model: nn.Module, layers: Collection[str]) -> None:
        self._values, self._all, self._graph = values, values.values, ValueGraph(values)
        self._layers = layers
        self._modules = dict(model.named_modules())
        self._names = list(self._modules)
        self._holders: dict[int, list[str]] = {}
        for owner, module in model.named_modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self._holders.setdefault(id(tensor), []).append(owner)
        self._calls: dict[str, list[ModuleCall]] = {}
        for call in values.calls:
            self._calls.setdefault(call.module, []).append(call)

    def find(self) -> tuple[list[Block], dict[str, str]]:
        blocks: list[tuple[int, frozenset[int], Block]] = []
        others: dict[str, str] = {}
        for total, stream, ends in self._graph.sums():
            for end in ends:
                branch = self._graph.between(stream, end)
                if not any(map(self._graph.is_product, branch)) or any(
                    inner in branch for inner, *_ in blocks
                ):
                    continue  # an activation function, or a block around others
                try:
                    blocks.append((total, branch, self._block(total, stream, end, branch)))
                except _NoBlock as reason:
                    others.setdefault(self._module_at(total), str(reason))
        return [block for *_, block in blocks], others

    def _module_at(self, number: int) -> str:
        """The innermost module that ran when a value was made."""
        inside = [c for c in self._values.calls if c.first <= number < c.stop]
        return min(inside, key=lambda c: c.stop - c.first).module if inside else ""

    def _block(self, total: int, stream: int, end: int, branch: frozenset[int]) -> Block:
        parts = {total, *self._graph.inner_sums(total)}
        for number in sorted(branch):
            elsewhere = [
                child
                for child in self._graph.children[number]
                if self._graph.live[child] and child not in branch and child not in parts
            ]
            if number in self._values.outputs or elsewhere:
                raise _NoBlock("what its branch computes is used elsewhere too")
        held = self._held(branch)
        output = self._output(end, branch, held)
        whole = list(self._outermost(held))
        modules = self._with_children(whole)
        if not modules & set(self._layers):
            raise _NoBlock("no module holds the layers of its branch")
        open_places = tuple(self._place(name, output, branch) for name in whole)
        places, name = open_places, output.module
        container = self._container(total, stream, branch)
        if container:
            places, name = (Place(container, None),), container
            modules = self._with_children([container])
        self._check_alone(modules)
        left = self._left(branch, modules)
        if left:
            raise _NoBlock(f"a product of its branch runs outside of what can go ({left})")
        steps = frozenset(
            self._all[n].step
            for call in (self._calls[n] for n in whole)
            for one in call
            for n in range(one.first, one.stop)
            if self._all[n].operation
        )
        scale = self._scale(end, branch)
        return Block(name, output, places, open_places, modules, steps, scale)

    def _scale(self, end: int, branch: frozenset[int]) -> str:
        while True:
            for call in self._values.calls:
                given = call.returned.get(())
                affine = isinstance(self._modules[call.module], _AFFINE)
                if affine and given and given.value == end and len(self._calls[call.module]) == 1:
                    weight = getattr(self._modules[call.module], "weight", None)
                    return call.module if isinstance(weight, nn.Parameter) else ""
            behind = self._graph.scaled_from(end, branch)
            if behind is None:
                return ""
            end = behind

    def _held(self, branch: frozenset[int]) -> set[str]:
        """The modules that run inside of the branch alone."""
        outside = [False] * len(self._all)  # it is not of the branch, and serves something else
        for number in reversed(range(len(self._all))):
            outside[number] = number not in branch and (
                number in self._values.outputs
                or any(outside[c] for c in self._graph.children[number] if self._graph.live[c])
            )
        made = [bool(value.operation) for value in self._all]
        foreign = _sums(m and o for m, o in zip(made, outside, strict=True))
        mine = _sums(number in branch for number in range(len(made)))
        every = _sums(made)

        def fits(call: ModuleCall) -> bool:
            if every[call.stop] == every[call.first]:  # it hands on what it is given
                given = [passed.value for passed in call.returned.values()]
                return bool(given) and branch.issuperset(given)
            return foreign[call.stop] == foreign[call.first]

        def takes_part(call: ModuleCall) -> bool:
            returned = (passed.value for passed in call.returned.values())
            return mine[call.stop] > mine[call.first] or not branch.isdisjoint(returned)

        return {
            name
            for name, calls in self._calls.items()
            if name and all(map(fits, calls)) and any(map(takes_part, calls))
        }

    def _outermost(self, held: Collection[str]) -> Iterator[str]:
        for name in self._names:
            parts = name.split(".")
            parents = (".".join(parts[:n]) for n in range(1, len(parts)))
            if name in held and not any(parent in held for parent in parents):
                yield name

    def _with_children(self, names: Collection[str]) -> frozenset[str]:
        return frozenset(
            name
            for name in self._names
            if any(name == one or name.startswith(f"{one}.") for one in names)
        )

    def _output(self, end: int, branch: frozenset[int], held: Collection[str]) -> Place:
        """The outermost module that gives what the branch adds."""
        while True:
            outermost = set(self._outermost(held))
            for call in reversed(
                self._values.calls
            ):  # the last: a dropout hands on what it is given
                for path, passed in call.returned.items():
                    name = call.module
                    if name in outermost and passed.value == end and len(self._calls[name]) == 1:
                        return Place(name, self._like(name), path)
            behind = self._graph.scaled_from(end, branch)
            if behind is None:
                raise _NoBlock("no module gives the output of its branch alone")
            end = behind

    def _like(self, name: str) -> int | str:
        call = self._calls[name][0]
        shapes = [passed.shape for passed in call.returned.values()]
        for key, passed in call.given.items():
            if passed.shape in shapes:
                return key
        return next(iter(call.given), 0)

    def _place(self, name: str, output: Place, branch: frozenset[int]) -> Place:
        if name == output.module:
            return output
        call = self._calls[name][0]
        if call.plain and set(call.returned) == {()} and call.given[0].value in branch:
            return Place(name, None)  # what is zero already is handed on
        return Place(name, self._like(name), next(iter(call.returned), ()))

    def _container(self, total: int, stream: int, branch: frozenset[int]) -> str:
        """The innermost module that is x without the branch; "" if there is none."""
        found = [
            call
            for name, calls in self._calls.items()
            for call in calls
            if name
            and len(calls) == 1
            and call.plain
            and call.given[0].value == stream
            and set(call.returned) == {()}
            and call.first <= min(branch)
            and call.stop > total
            and self._graph.is_stream(call.returned[()].value, total, stream)
            and all(
                n in branch
                or n == total
                or n == call.returned[()].value
                or not self._graph.live[n]
                or all(c in branch for c in self._graph.children[n])
                for n in range(call.first, call.stop)
                if self._all[n].operation
            )
        ]
        return min(found, key=lambda call: call.stop - call.first).module if found else ""

    def _left(self, branch: frozenset[int], modules: Collection[str]) -> str:
        """An operation of the branch that would be left to compute with zeros; "" if none."""
        gone = [c for c in self._values.calls if c.module in modules]
        for number in branch:
            inside = any(call.first <= number < call.stop for call in gone)
            if self._graph.is_product(number) and not inside:
                return self._all[number].operation
        return ""

    def _check_alone(self, modules: Collection[str]) -> None:
        for holders in self._holders.values():
            inside = [holder in modules for holder in holders]
            if any(inside) and not all(inside):
                raise _NoBlock("a parameter of its branch is shared with other modules")

"""Vectors of classes: what each place of a traced model goes with, and what removal makes of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from taylor_kernels.tracing.answer.counters import Counter, find_counters
from taylor_kernels.tracing.answer.units import IN, OUT, index
from taylor_kernels.tracing.model.code import Place
from taylor_kernels.tracing.notes.across import Across
from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.experts import ExpertWeights, Mixture
from taylor_kernels.tracing.notes.record import Record
from taylor_kernels.tracing.notes.steps import Step
from taylor_kernels.tracing.resolving.arrangement import Arrangement, places_in
from taylor_kernels.tracing.resolving.resolve import Resolved


@dataclass(frozen=True)
class Vectors:
    """The class of each place, list by list.

    Attributes:
        dims: (parameter or buffer, dimension) -> the classes along it. Most vectors are the same
            as some others, and one object then.
        layers: layer -> the classes of its input and of its output channels.
        norms: [(module, classes)] of every norm that works channel by channel, in running order.
        steps: the norms and products that channels go through, in running order.
        across: norm across channels -> its last call, and the channels' classes.
        called: module -> for each norm that its own code calls its place in the code, and the
            channels' classes, None if it keeps them.
        mixtures: router -> its mixture of experts, and the experts' classes.
        counters: the attributes that count channels.
        arrangement: the order of what is left of these vectors.
    """

    dims: dict[tuple[str, int], Vector]
    layers: dict[str, tuple[Vector, Vector]]
    norms: list[tuple[str, Vector]]
    steps: list[Step]
    across: dict[str, tuple[Across, Vector]]
    called: dict[str, tuple[tuple[Place, Vector | None], ...]]
    mixtures: dict[str, tuple[Mixture, Vector]]
    counters: list[Counter]
    arrangement: Arrangement

    @property
    def normed_together(self) -> list[Vector]:
        """The classes of the channels of each norm across channels."""
        called = (vector for calls in self.called.values() for _, vector in calls)
        return [
            *(vector for _, vector in self.across.values()),
            *(vector for vector in called if vector is not None),
        ]

    def entries(
        self, gone: npt.NDArray[np.bool_], before: npt.NDArray[np.bool_] | None = None
    ) -> dict[str, dict[int, Tensor]]:
        """Tensor -> dimension -> the indices [n] along it that go, ascending, where any do.

        Args:
            gone: [classes] bool, classes that are removed.
            before: [classes] bool, those that have been removed before; indices are of what is
                left without them.
        """
        vectors, bounds, every = self._different
        if before is not None and self.arrangement.stages:
            lefts = [self.arrangement.left(vector, before) for vector in vectors]
            every, bounds = np.concatenate(lefts), np.cumsum([0, *(v.size for v in lefts)])
        elif before is not None:
            stays = ~before[every]
            every, bounds = every[stays], np.append(0, stays.cumsum())[bounds]
        places = gone[every].nonzero()[0]
        ends = places.searchsorted(bounds)
        going = {
            id(vectors[n]): index(places[ends[n] : ends[n + 1]] - bounds[n])
            for n in (ends[1:] > ends[:-1]).nonzero()[0].tolist()
        }
        found: dict[str, dict[int, Tensor]] = {}
        for (name, dim), vector in self.dims.items():
            if (indices := going.get(id(vector))) is not None:
                found.setdefault(name, {})[dim] = indices
        return found

    @cached_property
    def _different(self) -> tuple[list[Vector], Vector, Vector]:
        """The different vectors of `dims`; where each begins, and the last ends, among all of them
        one after the other; these."""
        vectors = list({id(vector): vector for vector in self.dims.values()}.values())
        bounds = np.cumsum([0, *(vector.size for vector in vectors)])
        return vectors, bounds, np.concatenate([np.empty(0, np.int64), *vectors])

    def orders(
        self, gone: npt.NDArray[np.bool_], before: npt.NDArray[np.bool_]
    ) -> dict[str, dict[int, Tensor]]:
        """Tensor -> dimension -> which of the places [n] along it, once the indices of `entries`
        are deleted, comes first, second and so on, where the order changes.

        Args:
            gone, before: as of `entries`.
        """
        found: dict[str, dict[int, Tensor]] = {}
        known: dict[int, Tensor | None] = {}
        for (name, dim), vector in self.dims.items():
            if id(vector) not in known and not self.arrangement.moves(vector):
                known[id(vector)] = None
            elif id(vector) not in known:
                there = self.arrangement.left(vector, before)
                stays = there[~gone[there]]
                order = places_in(stays, self.arrangement.left(vector, gone | before))
                known[id(vector)] = None if (np.diff(order) == 1).all() else index(order)
            if (places := known[id(vector)]) is not None:
                found.setdefault(name, {})[dim] = places
        return found

    def places_after(
        self, gone: npt.NDArray[np.bool_], after: Vectors
    ) -> dict[tuple[str, str | int], Vector]:
        """(layer, side) or (tensor, dimension) -> for each of its places that stays the new one.

        Args:
            gone: [classes] bool, classes that are removed.
            after: what is left.
        """

        def moved(vector: Vector, new: Vector) -> Vector:
            stays = ~gone[vector]
            places = np.cumsum(stays) - 1
            if self.arrangement.stages and not np.array_equal(vector[stays], new):
                places[stays] = places_in(new, vector[stays])
            return places

        found: dict[tuple[str, str | int], Vector] = {
            key: moved(vector, after.dims[key]) for key, vector in self.dims.items()
        }
        for name, sides in self.layers.items():
            for side, vector, new in zip((IN, OUT), sides, after.layers[name], strict=True):
                found[name, side] = moved(vector, new)
        return found

    def without_classes(self, gone: npt.NDArray[np.bool_]) -> Vectors:
        """What is left of the whole model's once these classes are removed; the others keep their
        numbers.

        Args:
            gone: [classes] bool.
        """

        def left(vector: Vector) -> Vector:
            return self.arrangement.left(vector, gone)

        vectors = {id(vector): vector for vector in self.dims.values()}
        fewer = {key: left(vector) for key, vector in vectors.items()}
        return Vectors(
            dims={key: fewer[id(vector)] for key, vector in self.dims.items()},
            layers={name: (left(i), left(o)) for name, (i, o) in self.layers.items()},
            norms=[(name, left(vector)) for name, vector in self.norms],
            steps=[step.of(left(step.inputs), left(step.outputs)) for step in self.steps],
            across={name: (call, left(vector)) for name, (call, vector) in self.across.items()},
            called={
                name: tuple((place, None if v is None else left(v)) for place, v in calls)
                for name, calls in self.called.items()
            },
            mixtures={name: (m, left(vector)) for name, (m, vector) in self.mixtures.items()},
            counters=[(*which, left(vector)) for *which, vector in self.counters],
            arrangement=self.arrangement,
        )

    def without_modules(self, gone: Callable[[str], bool]) -> Vectors:
        """What is left once modules are removed, with all that is in them.

        Args:
            gone: says of the name of a module, layer or tensor whether it is removed.
        """
        stays = [not gone(step.module) and not gone(step.layer) for step in self.steps]
        number = np.cumsum(stays) - 1
        steps = []
        for step in itertools.compress(self.steps, stays):
            kept = step.of(step.inputs, step.outputs)
            kept.sources = frozenset(int(number[n]) for n in step.sources if stays[n])
            steps.append(kept)
        return Vectors(
            dims={key: v for key, v in self.dims.items() if not gone(key[0])},
            layers={name: sides for name, sides in self.layers.items() if not gone(name)},
            norms=[(name, vector) for name, vector in self.norms if not gone(name)],
            steps=steps,
            across={name: found for name, found in self.across.items() if not gone(name)},
            called={name: calls for name, calls in self.called.items() if not gone(name)},
            mixtures={name: found for name, found in self.mixtures.items() if not gone(name)},
            counters=[counter for counter in self.counters if not gone(counter[0])],
            arrangement=self.arrangement,
        )

    def expert_weights(self, bare: Collection[str]) -> list[ExpertWeights]:
        """How channels go through the weights of experts, by mixture.

        Args:
            bare: the names of weights that are layers by themselves.
        """
        return [
            self._weights_in(mixture, classes, bare) for mixture, classes in self.mixtures.values()
        ]

    def _weights_in(
        self, mixture: Mixture, classes: Vector, bare: Collection[str]
    ) -> ExpertWeights:
        dims: dict[str, list[Vector]] = {part: [] for part in mixture.parts}
        for (name, _), vector in self.dims.items():  # a tensor's dimensions, in their order
            if name in dims:
                dims[name].append(vector)
        products = {part: self.layers[part] for part in mixture.parts if part in bare}
        steps = [step for step in self.steps if step.weight in products]
        read_on = {self.steps[number].weight for step in steps for number in step.sources}
        last = [part for part in products if part not in read_on]
        last += [
            part
            for part, own in dims.items()
            if part not in products
            and len(own) == 2
            and any(np.array_equal(own[1], products[one][1]) for one in last)
        ]
        inside = f"{mixture.experts}."
        norms = (*self.across, *self.called, *dict(self.norms))
        normed = any(name.startswith(inside) for name in norms)
        return ExpertWeights(mixture.experts, classes, () if normed else tuple(last))


def numbered(label: Vector) -> tuple[Vector, Vector]:
    """The classes of atoms numbered without gaps, and for each class the atom that it goes by.

    Args:
        label: for each atom the one that its class goes by.
    """
    roots = np.flatnonzero(label == np.arange(label.size))
    number = np.zeros(label.size, np.int64)
    number[roots] = np.arange(roots.size)
    return number[label], roots


def find_dims(record: Record, label: Vector) -> dict[tuple[str, int], Vector]:
    """`Vectors.dims` of a run.

    Args:
        label: the class of each atom.
    """
    dims: dict[tuple[str, int], Vector] = {}
    same: dict[bytes, Vector] = {}
    for start, name, dim, size in record.starts:
        vector = label[start : start + size]
        dims[name, dim] = same.setdefault(vector.tobytes(), vector)
    return dims


def find_vectors(
    record: Record,
    label: Vector,
    dims: dict[tuple[str, int], Vector],
    layers: dict[str, tuple[Vector, Vector]],
    resolved: Resolved,
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    arrangement: Arrangement,
) -> Vectors:
    """All vectors of a run, of its atoms' classes.

    Args:
        label: the class of each atom.
        resolved: what the run says of these.
        modules: dict(model.named_modules()).
        tensors: the model's parameters and buffers by their first names.
        arrangement: says in which order channels lie once some have gone.
    """
    steps = [step.of(label[step.inputs], label[step.outputs]) for step in record.steps]
    normed = {call.module: (call, label[call.vectors[0]]) for call in resolved.across}
    return Vectors(
        dims=dims,
        layers=layers,
        norms=[(norm.module, label[norm.atoms]) for norm in record.norms],
        steps=steps,
        across=normed,
        called={
            name: tuple((place, None if v is None else label[v]) for place, v in each.vectors)
            for name, each in resolved.called.items()
        },
        mixtures={m.router: (m, label[m.atoms]) for m in record.mixtures},
        counters=find_counters(record, label, dims, layers, normed, steps, modules, tensors),
        arrangement=arrangement,
    )

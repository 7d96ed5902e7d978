"""Attributes of a traced model that count channels, and what they become once some are gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.nn.utils import parametrize

from taylor_kernels.tracing.model.settings import get_attribute
from taylor_kernels.tracing.notes.across import Across
from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.attributes import rules_of
from taylor_kernels.tracing.notes.record import Record
from taylor_kernels.tracing.notes.steps import NORM, Step
from taylor_kernels.tracing.resolving.resolve import counted

#: An attribute that counts: its module, its name, its value, the classes that it counts.
Counter = tuple[str, str, Any, Vector]


def find_counters(
    record: Record,
    label: Vector,
    dims: Mapping[tuple[str, int], Vector],
    layers: Mapping[str, tuple[Vector, Vector]],
    across: Mapping[str, tuple[Across, Vector]],
    steps: Iterable[Step],
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
) -> list[Counter]:
    """The attributes that a rule names, and those that the run showed to count.

    Args:
        label: the class of each atom.
        dims: (tensor, dimension) -> the classes along it.
        layers: layer -> the classes of its input and output channels.
        across: as `Vectors.across`.
        steps: the steps of the run, in classes.
        modules: dict(model.named_modules()).
        tensors: the model's parameters and buffers by their first names.
    """
    found: list[Counter] = []
    firsts: dict[int, str] = {}
    for name, tensor in tensors.items():
        firsts.setdefault(id(tensor), name)
    groups = {p.module: label[p.groups] for p in record.products if p.groups is not None}
    norms = {norm.module: label[norm.atoms] for norm in record.norms}
    norms |= {s.module: s.outputs for s in steps if s.output_dim and s.kind == NORM}
    for name, module in modules.items():
        for attribute, what in rules_of(module).items():
            vector, old = None, getattr(module, attribute, None)
            if isinstance(what, tuple):
                counted_in = _inside(module, what[0])
                first = firsts.get(id(counted_in), "")
                vector = dims.get((first, what[1]))
                if counted_in is None and name in across:  # a norm without parameters
                    vector = across[name][1]
                elif isinstance(old, tuple) and (first, len(old) - 1) in dims:
                    # As many sizes as the tensor has dimensions: each goes by its own.
                    places = range(len(old))
                    found += [(name, f"{attribute}[{n}]", old, dims[first, n]) for n in places]
                    continue
                if vector is not None and isinstance(old, int) and old != vector.size:
                    vector = None  # it counts something else
            elif what == "groups":
                vector = groups.get(name)
            elif what == "norm":
                # Its vectors first: an InstanceNorm is run on channels repeated by example.
                own = [firsts.get(id(t), "") for t in (module.weight, module.running_mean)]
                vectors = [dims[o, 0] for o in own if (o, 0) in dims]
                vector = vectors[0] if vectors else norms.get(name)
            elif name in layers:
                vector = layers[name][what == "outputs"]
            if vector is not None and old is not None:
                found.append((name, attribute, old, vector))
    for size in counted(record.sizes, label):
        listed, _, place = size.attribute.partition("[")
        kept = get_attribute(modules[size.module], listed) if place else 0
        found.append((size.module, size.attribute, kept, label[size.atoms]))
    return found


def _inside(module: nn.Module, name: str) -> object:
    """An attribute of a module, or of modules in it; None if there is no such.

    Of one that a parametrization works out (`weight_norm`), the greatest tensor it is made of.
    """
    found: object = module
    for part in name.split("."):
        if isinstance(found, nn.Module) and parametrize.is_parametrized(found, part):
            made_of = found.get_submodule(f"parametrizations.{part}").parameters()
            return max(made_of, key=Tensor.numel, default=None)
        found = getattr(found, part, None)
    return found


def shrunk(counters: Iterable[Counter], gone: npt.NDArray[np.bool_]) -> dict[str, dict[str, Any]]:
    """What becomes of attributes: module -> attribute -> value, of those that change.

    Args:
        gone: [classes] bool.
    """
    found: dict[str, dict[str, Any]] = {}
    lists: dict[tuple[str, str], tuple[Any, dict[int, int]]] = {}
    changed = set()
    counts: dict[int, int] = {}  # most vectors are those of several attributes
    for module, attribute, old, vector in counters:
        if (left := counts.get(id(vector), -1)) < 0:
            left = counts[id(vector)] = vector.size - int(np.count_nonzero(gone[vector]))
        name, _, place = attribute.partition("[")
        if place:
            # Entries that stay this time may have changed before.
            lists.setdefault((module, name), (old, {}))[1][int(place[:-1])] = left
            if left != vector.size:
                changed.add((module, name))
        elif left != vector.size:
            value = (*old[:-1], left) if isinstance(old, tuple) else left
            found.setdefault(module, {})[attribute] = value
    for module, name in lists.keys() & changed:
        old, entries = lists[module, name]
        values = type(old)(entries.get(place, value) for place, value in enumerate(old))
        found.setdefault(module, {})[name] = values
    return found

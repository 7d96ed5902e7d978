"""Mixtures of experts: a router that chooses among slices of stacked parameters.

A router sends each token to its `top_k` best experts, by a softmax over all. An expert whose row of
the router is zero is chosen still, so masking it is not removing it. What being without it means is
a definition, as it is for norms: **the router's choice is among the experts that are kept**. The
router has a module of its own here, as the models of transformers have it: its `weight`, and `bias`
if there is one, has a row for each expert, and it returns numbers of experts. The experts are the
slices along dimension 0 of all parameters of another module beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.entries import Size
from taylor_kernels.tracing.notes.record import Record


class Result(Enum):
    """What a router returns in one place, by which it is put back among all experts."""

    NUMBERS = "numbers of the experts that are chosen"
    LOGITS = "minus infinity for an expert that is not there"
    PROBABILITIES = "zero for an expert that is not there"
    OTHER = "the same, whatever experts there are"


@dataclass(frozen=True)
class Mixture:
    """A router and its experts.

    Attributes:
        router, experts: names of the modules.
        parts: the names of the experts' parameters; experts lie along dimension 0 of each.
        top_k: so many experts a token is sent to.
        atoms: of the experts.
        lifted: numbers of entries in the record's `fixed` that the definition takes back.
        results: of each leaf of what the router returns.
    """

    router: str
    experts: str
    parts: tuple[str, ...]
    top_k: int
    atoms: Vector
    lifted: frozenset[int]
    results: tuple[Result, ...]


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of a mixture's experts, as channels go through them.

    Attributes:
        module: the name of the experts' module.
        classes: of the experts.
        last: what makes an expert's output, which is linear in these together: the weights that no
            other weight of the experts reads, and what is added to their products. Empty where a
            norm in the module undoes a factor on them.
    """

    module: str
    classes: Vector
    last: tuple[str, ...]


def find_mixtures(
    record: Record, modules: Mapping[str, nn.Module], returned: Mapping[str, Any]
) -> list[Mixture]:
    """The mixtures that have run; the atoms of a router's rows and of its experts become one.

    Args:
        returned: what routers (`is_router`) have returned, by name.
    """
    places = {(name, dim): (start, size) for start, name, dim, size in record.starts}
    found = []
    for name, router in modules.items():
        if name not in record.ran or not is_router(router):
            continue
        count, top_k = _counts(router)
        beside = [
            other for other in _siblings(name, modules) if _are_experts(modules[other], count)
        ]
        if len(beside) != 1 or beside[0] not in record.ran:
            continue
        experts = beside[0]
        parts = tuple(f"{experts}.{leaf}" for leaf, _ in modules[experts]._parameters.items())
        own = (f"{name}.{leaf}" for leaf, _ in router.named_parameters(recurse=False))
        keys = [*((leaf, 0) for leaf in own), *((part, 0) for part in parts)]
        if not all(key in places for key in keys):
            continue  # a parameter that is another's too
        rows = [np.arange(start, start + size) for start, size in (places[key] for key in keys)]
        every = np.concatenate(rows)
        lifted = {
            number
            for number, (atoms, reason) in enumerate(record.fixed)
            if reason.module in (name, experts) and np.isin(atoms[atoms != 0], every).all()
        }
        results = _results(returned.get(name), count, top_k)
        if isinstance(results, str):
            for number in lifted:
                atoms, reason = record.fixed[number]
                text = f"belongs to an expert, and router {name!r} returns {results}"
                record.fixed[number] = atoms, replace(reason, text=text)
            continue
        for other in rows[1:]:
            record.join(rows[0], other, (experts, "select"))
        for module in (name, experts):
            record.sizes.append(Size(module, "num_experts", rows[0], False))
        mixture = Mixture(name, experts, parts, top_k, rows[0], frozenset(lifted), results)
        found.append(mixture)
    return found


def _results(returned: Any, count: int, top_k: int) -> tuple[Result, ...] | str:
    """What the leaves of a router's output are; where one cannot be told, what that is."""
    found = []
    for leaf in tree_leaves(returned):
        result = _result(leaf, count, top_k)
        if isinstance(result, str):
            return result
        found.append(result)
    return tuple(found)


def _result(leaf: Any, count: int, top_k: int) -> Result | str:
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return Result.OTHER
    if not isinstance(leaf, Tensor):
        return f"a {type(leaf).__name__}"
    last = leaf.size(-1) if leaf.dim() else 0
    if leaf.dtype == torch.bool or leaf.is_complex():
        return f"{str(leaf.dtype)[6:]} values"
    if not leaf.is_floating_point():
        if last == top_k and bool(((leaf >= 0) & (leaf < count)).all()):
            return Result.NUMBERS
        return f"integers of shape {tuple(leaf.shape)}, which are no numbers of {top_k} experts"
    if last != count:
        return Result.OTHER
    values = leaf.detach().double()
    if bool((values < 0).any()):
        return Result.LOGITS
    if torch.allclose(values.sum(-1), values.new_ones(()), atol=0.02):  # of half types as well
        return Result.PROBABILITIES
    return (
        "no negative number for any expert of the example, and no probabilities that add up to "
        "one: what it would return of an expert that is not there cannot be told"
    )


def _counts(module: nn.Module) -> tuple[int, int]:
    """How many experts a module says that there are, and how many a token goes to; or zeros."""
    held = vars(module)
    if "top_k" not in held:
        return 0, 0
    count, top_k = held.get("num_experts"), held["top_k"]
    return (count, top_k) if type(count) is int and type(top_k) is int else (0, 0)


def is_router(module: nn.Module) -> bool:
    """Whether a module has what a router has."""
    count, top_k = _counts(module)
    if top_k <= 0 or list(module.children()):
        return False
    own = dict(module.named_parameters(recurse=False))
    if own.keys() - {"bias"} != {"weight"} or own["weight"].shape[:-1] != (count,):
        return False
    return "bias" not in own or own["bias"].shape == (count,)


def _are_experts(module: nn.Module, count: int) -> bool:
    own = [parameter for _, parameter in module._parameters.items()]
    stacked = [p is not None and p.dim() > 1 and p.size(0) == count for p in own]
    return bool(stacked) and all(stacked) and vars(module).get("num_experts") == count


def _siblings(name: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    parent = name.rpartition(".")[0]
    for other in modules:
        if other and other != name and other.rpartition(".")[0] == parent:
            yield other


@contextmanager
def one_expert_at_a_time(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, models of transformers run their experts in a loop over slices, as their own classes
    are written, and not in fused products of all, into which no trace sees.

    Args:
        modules: all of a model's.
    """
    key = "_experts_implementation_internal"
    configs = {id(m.config): vars(m.config) for m in modules if _has_config(m)}
    before = [(held, held[key]) for held in configs.values() if key in held]
    for held, _ in before:
        held[key] = "eager"
    try:
        yield
    finally:
        for held, value in before:
            held[key] = value


def _has_config(module: nn.Module) -> bool:
    return hasattr(vars(module).get("config"), "__dict__")

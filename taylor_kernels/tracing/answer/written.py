"""Sizes that code wrote down as numbers, of which a run does not show where they are from.

They are looked for where a model does not run without some of its channels: what is as wide then
loses the same channels.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from torch import nn

from taylor_kernels.tracing.notes.atoms import Vector, address
from taylor_kernels.tracing.notes.attributes import holding
from taylor_kernels.tracing.notes.entries import Cut, Echo, Join, Size
from taylor_kernels.tracing.notes.record import Record
from taylor_kernels.tracing.resolving.resolve import ambiguous

#: Names of attributes that say how wide an input is; others have its size by chance.
_INPUTS = re.compile(r"channels|planes|features|width|dim|hidden")


def with_written_sizes(
    record: Record,
    label: Vector,
    asked: npt.NDArray[np.bool_],
    modules: Mapping[str, nn.Module],
    at: Collection[str] | None,
    guessed: bool = False,
    loosely: bool = False,
) -> Record | None:
    """The record where sizes that code wrote down are those of other tensors.

    Args:
        label: atom -> class.
        asked: [classes] bool, only sizes that count any of these.
        modules: dict(model.named_modules()).
        at: only sizes that the code of these modules wrote down, the least doubtful of them first;
            None for all modules.
        guessed: they are only what else holds them than attributes that are known to.
        loosely: any as many channels go of what is as wide, and not those of the same places.

    Returns:
        None where there are no such sizes.
    """
    if guessed:
        guesses = _guessed(record, label, asked, at)
        return replace(record, sizes=record.sizes + guesses) if guesses else None
    joins: list[Join] = []
    cuts: list[Cut] = []
    coupled = {cut.source for cut in record.cuts}
    doubt = 0
    counting = {(s.module, label[s.atoms].tobytes()) for s in record.sizes if not s.weak}
    for least, echo in sorted(
        ((_doubt(echo, label, counting), echo) for echo in record.echoes),
        key=lambda pair: pair[0],
    ):
        if at is not None and (echo.where[0] not in at or ((joins or cuts) and least > doubt)):
            continue
        mine = label[echo.vector]
        # What is of no parameter says nothing: a size that is its is a constant.
        others = (o for o in echo.others if o.any() and not np.array_equal(label[o], mine))
        other = next(others, None)
        if other is None or not (asked[mine].any() or asked[label[other]].any()):
            continue
        both = address(echo.vector), address(other)
        if both in coupled:
            continue
        if loosely:
            cuts.append(_as_many(echo, other, both))
            coupled.add(both)
        else:
            joins.append(Join(echo.vector, other, echo.where, len(record.fixed)))
        doubt = least
    if cuts:
        return replace(record, cuts=[*record.cuts, *cuts])
    if loosely:
        return None
    shared = ambiguous(record.sizes, label)
    shared = {
        (size.module, size.attribute)
        for size in record.sizes
        if (size.module, size.attribute) in shared
        and (at is None or (size.module in at and not joins))
        and asked[label[size.atoms]].any()
    }
    compared = [s for s in _compared(record, modules, at or ()) if asked[label[s.atoms]].any()]
    if not joins and not shared and not compared:
        compared = _guessed(record, label, asked, at)
    if not joins and not shared and not compared:
        return None
    sizes = [
        replace(size, weak=size.weak and (size.module, size.attribute) not in shared)
        for size in record.sizes
    ]
    return replace(record, joins=[*record.joins, *joins], sizes=sizes + compared)


def _as_many(echo: Echo, other: Vector, source: tuple[int, int]) -> Cut:
    """As many channels go of one dimension as of another: of the two side by side each half loses
    the same number."""
    width = other.size
    halves = ((0, width), (width, 2 * width))
    return Cut(np.concatenate([echo.vector, other]), halves, source, True, False, echo.where)


def _guessed(
    record: Record, label: Vector, asked: npt.NDArray[np.bool_], at: Collection[str] | None
) -> list[Size]:
    """Attributes of these modules, or of all, that hold the number of parts that PyTorch has
    counted, and are known to count nothing else, so that code may work other sizes out from them;
    and what else holds a size that code wrote down."""
    known = {(size.module, size.attribute) for size in record.sizes if not size.weak}
    return [
        size
        for size in record.guesses
        if (at is None or size.module in at)
        and (size.module, size.attribute) not in known
        and asked[label[size.atoms]].any()
    ]


def _doubt(echo: Echo, label: Vector, counting: Collection[tuple[str, bytes]]) -> int:
    """`Echo.doubt`, once it is known what the attributes of each module count."""
    counts = (echo.where[0], label[echo.vector].tobytes()) in counting
    return max(2, echo.doubt) if echo.doubt and counts else echo.doubt


def _compared(record: Record, modules: Mapping[str, nn.Module], at: Collection[str]) -> list[Size]:
    """Attributes of these modules that hold the width that a layer of theirs reads, or the first
    layer in a module of theirs, or that they normalise."""
    known = {(size.module, size.attribute) for size in record.sizes if not size.weak}
    found: dict[tuple[str, str], Size] = {}
    begun: set[str] = set()
    for product in record.products:
        path = product.module.split(".")
        around = [".".join(path[:end]) for end in range(len(path) - 1, 0, -1)] or [""]
        for place, module in enumerate(around):
            own = not place or module not in begun
            begun.add(module)
            if module not in at or not own or product.inputs.size < 2:
                continue
            for attribute in holding(modules[module], product.inputs.size):
                if (module, attribute) not in known and _INPUTS.search(attribute):
                    size = Size(module, attribute, product.inputs, False)
                    found.setdefault((module, attribute), size)
    for call in record.across:
        channels = call.vectors[0]
        for attribute in holding(modules[call.module], channels.size) if call.module in at else ():
            if (call.module, attribute) not in known and _INPUTS.search(attribute):
                size = Size(call.module, attribute, channels, False)
                found.setdefault((call.module, attribute), size)
    return list(found.values())

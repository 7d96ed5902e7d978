"""Parts of a dimension that code takes: what says how large each is, once channels have gone."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from taylor_kernels.tracing.notes.atoms import Vector, address
from taylor_kernels.tracing.notes.attributes import counting, tie, tie_parts
from taylor_kernels.tracing.notes.entries import Cut, Size
from taylor_kernels.tracing.run.calls import Call


def note_parts(call: Call, vector: Vector, parts: Sequence[tuple[int, int, int]]) -> None:
    """Write down which parts of a dimension were taken.

    Args:
        vector: the atoms of the dimension.
        parts: of each part the place that it begins at, its size, and its step.
    """
    record = call.record
    every = max(step for _, _, step in parts)
    if every > 1:
        # Every k-th place: the k places of a period go together.
        if vector.size % every:
            call.refuse(vector, "is taken by a step that does not divide its width")
            return
        rows = vector.reshape(-1, every)
        for column in range(1, every):
            call.join(rows[:, 0], rows[:, column])
        return
    spans = tuple((start, start + size) for start, size, _ in parts)
    inner = tuple(span for span in spans if span != (0, vector.size))
    # Code that lists the sizes of parts gives that of the last one too.
    named = inner if call.name.endswith("split_with_sizes") else inner[:-1]
    tied = len(spans) > 1 and tie_parts(call, vector, spans)
    if tied:
        # The list may hold these sizes by chance, and the code have them from elsewhere.
        for start, stop in named:
            record.guesses += _counting(call, vector[start:stop].copy())
    else:
        ties = [tie(call, stop - start, vector[start:stop]) for start, stop in named]
        tied = all(ties[: len(inner) - 1])
    if len(inner) == 1 and len(spans) == 1:
        start, stop = inner[0]
        tied = tie(call, stop - start, vector[start:stop])
        if start and not tied:
            tied = tie(call, start, vector[:start])
    key = (address(vector), vector.size)
    equal = call.name in ("chunk", "unsafe_chunk", "unbind")
    others = () if equal or (tied and len(spans) > 1) else _others(call, vector, spans)
    sizes = _counting(call, vector[inner[-1][0] :]) if others and len(spans) > 1 else []
    short = equal and spans[-1][1] - spans[-1][0] < spans[0][1] == vector.size // len(spans) + 1
    short = short and call.args.get("chunks") == len(spans)
    record.cuts.append(
        Cut(vector, inner, key, equal, tied, call.where, others, tuple(sizes), short)
    )
    if not tied and not equal:
        # Code may work places out from the width of all, which an attribute holds.
        record.guesses += _counting(call, vector.copy())


def _counting(call: Call, part: Vector) -> list[Size]:
    """What attributes of the running module may say of the width of a part."""
    module = call.holder[1]
    return [Size(module, attribute, part, False) for attribute in counting(call, part.size)]


def _others(
    call: Call, vector: Vector, spans: Sequence[tuple[int, int]]
) -> tuple[Vector | None, ...]:
    """`Cut.others` where a dimension is split into parts of unlike sizes, or one is sliced off."""
    sizes = [stop - start for start, stop in spans]
    if len(spans) > 1 and (len(set(sizes)) < 2 or sum(sizes) < vector.size):
        return ()
    found: list[Vector | None] = []
    for start, stop in spans:
        part = vector[start:stop]
        counts = part.size > 1 and bool(counting(call, part.size))
        wide = [part] if counts else call.recorder.frame.as_wide(part)
        if _is_rest(call) and not counts:
            # What goes of it goes by what it meets; that it is as wide says that the code knows so.
            found.append(part if wide else part[:0])
        else:
            found.append(wide[0] if wide and part.size > 1 else None)
    return tuple(found)


def _is_rest(call: Call) -> bool:
    """Whether a part is what others leave: `y[d:]` and `y[d:-3]`, but not `y[-3:]`."""
    if call.name != "slice":
        return False
    start, end = (call.args.get(name) for name in ("start", "end"))
    open_end = end is None or end == sys.maxsize or end < 0
    return open_end and (start is None or start >= 0)

"""Which of the axes that a reshape makes may shrink, and which may be constants of code."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.attributes import tie
from taylor_kernels.tracing.run.calls import Call

#: A dimension so many times as wide as those behind it is no number of groups.
_PLAIN = 4
#: So many channels are rather a width than a constant of code: a number of groups, pieces,
#: coordinates. Where it is one after all, code that is given fewer channels fails in the proof.
_WIDE = 8


def may_shrink(
    call: Call, grid: Vector, theirs: Sequence[int], inferred: Sequence[int]
) -> list[int]:
    """Which axes of a new grid the code that made it lets shrink.

    One that PyTorch infers does, one that an attribute counts can be made to. Of the others one was
    worked out from the width, unless PyTorch had to infer one: they are constants then. It is taken
    to be the widest, where that is plain: numbers of groups come first and are few, and of
    (4, 2) either may be the number. Where the others are of space, or of a batch, there is no such
    number, and the size is that of the channels, from wherever it is: but for a constant beside an
    axis of one place that PyTorch had to infer, as that of `view(n, -1, 2)` of two channels. Code
    that puts an axis in by `(*shape[:1], -1, *shape[1:])`, as einops' `pack`, does so too.
    """
    along = [i for i in range(grid.ndim) if (grid != grid.take([0], axis=i)).any()]
    constant = any(i in inferred and grid.shape[place] == 1 for place, i in enumerate(theirs))
    if len(along) == 1 and (not constant or grid.shape[along[0]] >= _WIDE):
        return along
    may, unknown = [], []
    for place, i in enumerate(theirs):
        if i in inferred or tie(call, grid.shape[place], None, index=place, settings=True):
            may.append(place)
        elif grid.shape[place] > 1:
            unknown.append(place)
    if unknown and not any(i in inferred for i in theirs):
        *others, widest = sorted(unknown, key=lambda place: (grid.shape[place], place))
        least = max((grid.shape[place] for place in others), default=0)
        if any(place > widest for place in others):
            least = _PLAIN * least - 1
        if grid.shape[widest] > least:
            may.append(widest)
    return may


def may_be_groups(
    call: Call,
    old: Sequence[int],
    new: Sequence[int],
    before: int,
    place: int,
    inferred: Sequence[int],
    allowed: Collection[int] | None,
) -> bool:
    """Whether the size of a dimension that stays whole may be a constant.

    As in view(n, 2, c // 2, h, w) of two channels: the same sizes as those of an added dimension.
    Many channels are no groups of one: the added dimension is one of space (windows of the whole
    height).
    """
    size = new[place]
    added = new[place + 1 : place + 2] == (1,) and old[before + 1 : before + 2] != (1,)
    if size < 2 or size >= _WIDE or not added:
        return False
    if allowed is not None:
        return place not in allowed
    follow = any(later > 1 for later in new[place + 2 :])
    return (follow or place + 1 in inferred) and not tie(call, size, None)

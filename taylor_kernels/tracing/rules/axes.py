"""Views whose arguments alone say where each dimension goes.

Other views are run again on the labels, which takes ten times as long.
"""

from __future__ import annotations

from dataclasses import dataclass

from taylor_kernels.tracing.run.calls import Call

_SPLITS = {
    "split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Axes:
    """Where the dimensions of a view's source go.

    Attributes:
        order: for each the dimension of all results that it becomes.
        cut: the one of which each result has a part; -1 if none.
        starts: where in that each result begins.
    """

    order: list[int]
    cut: int = -1
    starts: tuple[int, ...] = ()


def find_axes(call: Call, shape: tuple[int, ...]) -> Axes | None:
    """What the arguments of a view say; None where they do not, or a part is empty.

    Args:
        shape: the source's, of one dimension at least.
    """
    name, args, order = call.name, call.args, list(range(len(shape)))
    if name == "transpose":
        one, other = args["dim0"], args["dim1"]
        if type(one) is not int:
            return None  # by the names of dimensions
        order[one], order[other] = order[other], order[one]
        return Axes(order)
    if name == "t":
        return Axes(order[::-1])
    if name == "permute":
        for place, dim in enumerate(args["dims"]):
            order[dim] = place
        return Axes(order)
    if name == "unsqueeze":
        dim = args["dim"] % (len(shape) + 1)
        return Axes([place + (place >= dim) for place in order])
    if name != "slice" and name not in _SPLITS:
        return None
    cut = args.get("dim", 0)
    if type(cut) is not int or args.get("step", 1) != 1:
        return None
    cut %= len(shape)
    sizes = [out.size(cut) for out in call.outs]
    if 0 in sizes:
        return None
    if name == "slice":
        starts = [range(shape[cut])[args.get("start") : args.get("end")].start]
    else:
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return Axes(order, cut, tuple(starts))

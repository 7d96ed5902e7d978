"""How much products put out in a run that code makes with weights by itself, without a layer.

Code may multiply by a parameter of its own, as nn.MultiheadAttention does, by slices of one, as a
mixture of experts does, or by the weight of a layer that it does not call. There is no module then
whose output could be heard. Operations below functions show these, whatever wrote them
(`x @ w`, einsum, `F.linear`, `F.conv2d`): a weight and its views have one memory.

Not heard are products that add up what they multiply in one step (`torch.addbmm`, and `addmm` or
`baddbmm` to more than a bias), `F.bilinear`, `torch._grouped_mm`, and products with tensors that a
weight is put into beside others (`cat`, `stack`). What is wrong in front of those shows behind them
or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from taylor_kernels.tracing.notes.memories import Memories
from taylor_kernels.tracing.notes.operations import memory_of

_ATEN = torch.ops.aten


def _overloads(*packets: Any) -> Iterator[tuple[Any, Any]]:
    """The operations of these names, each with its name."""
    for packet in packets:
        yield from ((getattr(packet, overload), packet) for overload in packet.overloads())


#: Name of operations -> the places of their two operands.
_OPERANDS = {
    _ATEN.mm: (0, 1), _ATEN.bmm: (0, 1), _ATEN.mv: (0, 1), _ATEN.linear: (0, 1),
    _ATEN.addmm: (1, 2), _ATEN.baddbmm: (1, 2), _ATEN.addmv: (1, 2), _ATEN.convolution: (0, 1),
}  # fmt: skip
#: Those that add a first argument.
_ADDING = (_ATEN.addmm, _ATEN.baddbmm, _ATEN.addmv)
_PRODUCTS = dict(_overloads(*_OPERANDS))
_TAKES = dict(_overloads(_ATEN.index, _ATEN.index_select))
#: What makes another tensor of a weight that is one too: copies, parts, and products with numbers
#: or masks of its shape.
_COPIES = _TAKES | dict(_overloads(_ATEN.clone, _ATEN._to_copy, _ATEN.mul, _ATEN.div))

#: Is told the name of a weight, what came of a product with it, and the dimensions of that that
#: channels of weights lie along.
Hear = Callable[[str, Tensor, tuple[int, ...]], None]


class WeightProducts(TorchDispatchMode):
    """Hears what products with some weights put out.

    Args:
        weights: by name, as they are in this run.
        hear: is told.
    """

    def __init__(self, weights: Mapping[str, Tensor], hear: Hear) -> None:
        super().__init__()
        self._hear = hear
        self._names: dict[int, str] = {}  # by the memory of weights and of their copies
        self._memories = Memories()
        for name, weight in weights.items():
            self._know(weight, name)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._memories.release()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        out = func(*args, **kwargs) if kwargs else func(*args)
        if func in _PRODUCTS:
            self._product(_PRODUCTS[func], args, out)
        elif func in _COPIES and isinstance(args[0], Tensor):
            name = self._names.get(memory_of(args[0]))
            if name is not None and (func in _TAKES or out.shape == args[0].shape):
                self._know(out, name)
        return out

    def _know(self, tensor: Tensor, name: str) -> None:
        memory = self._memories.hold(tensor)
        if memory >= 0:  # others have none of their own to know them by
            self._names.setdefault(memory, name)

    def _product(self, packet: Any, args: tuple, out: Tensor) -> None:
        if packet in _ADDING and args[0].dim() > 1:  # what is added need not be zero where masked
            return
        left, right = (args[place] for place in _OPERANDS[packet])
        row, column = self._names.get(memory_of(left)), self._names.get(memory_of(right))
        if packet is _ATEN.convolution:
            if column is not None:
                self._hear(column, out, (1 - right.dim(),))
        elif row is not None and packet in (_ATEN.mv, _ATEN.addmv):
            self._hear(row, out, (-1,))
        elif column is not None:
            self._hear(column, out, (-1,) if row is None else (-1, -2))
        elif row is not None:
            self._hear(row, out, (-2,))

"""How much products put out in a run that code makes with weights by itself, without a layer.

Code may multiply by a parameter of its own, as nn.MultiheadAttention does, by slices of one, as a
mixture of experts does, or by the weight of a layer that it does not call. There is no module then
whose output could be heard. Operations below functions show these, whatever wrote them
(`x @ w`, einsum, `F.linear`, `F.conv2d`): a weight and its views have one memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
        self._names: dict[int, str] = {}
        self._copies: list[Tensor] = []  # as long as they are there, no other has their memory
        for name, weight in weights.items():
            self._names.setdefault(_memory(weight), name)
        self._names.pop(0, None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        out = func(*args, **kwargs) if kwargs else func(*args)
        if func in _PRODUCTS:
            self._product(_PRODUCTS[func], args, out)
        elif func in _COPIES and isinstance(args[0], Tensor):
            name = self._names.get(_memory(args[0]))
            same = func in _TAKES or out.shape == args[0].shape
            if name is not None and same and (memory := _memory(out)):
                self._names.setdefault(memory, name)
                self._copies.append(out)
        return out

    def _product(self, packet: Any, args: tuple, out: Tensor) -> None:
        if packet in _ADDING and args[0].dim() > 1:  # what is added need not be zero where masked
            return
        left, right = (args[place] for place in _OPERANDS[packet])
        row, column = self._names.get(_memory(left)), self._names.get(_memory(right))
        if packet is _ATEN.convolution:
            if column is not None:
                self._hear(column, out, (1 - right.dim(),))
        elif row is not None and packet in (_ATEN.mv, _ATEN.addmv):
            self._hear(row, out, (-1,))
        elif column is not None:
            self._hear(column, out, (-1,) if row is None else (-1, -2))
        elif row is not None:
            self._hear(row, out, (-2,))


def _memory(tensor: Tensor) -> int:
    """Where a tensor's numbers lie; 0 where it has none of its own."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0

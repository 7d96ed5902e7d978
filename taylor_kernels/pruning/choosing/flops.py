"""What a model costs as units go: filters, parameters and FLOPs, exact and without running it.

Every cost is a sum over parameter tensors of a coefficient times the product of the tensor's
extents: 1 for parameters; for FLOPs two for every multiply-add that an entry of a weight takes part
in, which does not change as the layer shrinks. What else `torch.utils.flop_counter` counts, such as
the products inside attention, stays as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from torch import nn

from taylor_kernels.pruning.choosing.groups import Group
from taylor_kernels.tracing import Block
from taylor_kernels.tracing.notes.operations import RECURRENT, OperationMode, operation

#: Layers whose multiply-adds for an entry of the output are the entries of a row of the weight.
#: To take a composite operation apart, so as to count it, takes longer than a small one runs.
_LAYERS = {"linear", "conv1d", "conv2d", "conv3d"}
#: Composite operations that are frequent, and in whatever form none of their parts is counted.
_PRODUCTLESS = {
    "batch_norm", "_batch_norm_impl_index", "layer_norm", "group_norm", "rms_norm", "softmax",
    "log_softmax", "dropout", "feature_dropout", "to", "contiguous", "reshape", "flatten",
    "unflatten", "chunk", "unsafe_chunk", "split", "tensor_split", "narrow", "movedim", "swapaxes",
    "concat", "pad", "where", "type_as", "view_as", "max_pool1d", "max_pool2d", "max_pool3d",
    "avg_pool1d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Counts: output filters of the layers that can be pruned, and the whole model's parameters
    and FLOPs (on the example inputs, a multiply-add being two)."""

    filters: int
    params: int
    flops: int

    def over(self, whole: Cost) -> dict[str, float]:
        """Each count as a fraction of the whole's."""
        return {
            "filters": self.filters / whole.filters if whole.filters else 1.0,
            "params": self.params / whole.params,
            "flops": self.flops / whole.flops if whole.flops else 1.0,
        }


class _Shrinking(NamedTuple):
    """What a unit of a group takes.

    Attributes:
        filters: (layer, filters there) of each layer that makes its channels.
        tensors: name and extents, the FLOPs of an entry, (dimension, channels there).
    """

    filters: list[tuple[str, int]]
    tensors: list[tuple[str, list[int], int, list[tuple[int, int]]]]


class Meter:
    """The cost of a model with some units gone; `take()` updates it.

    Args:
        model: the whole model.
        macs: parameter -> the multiply-adds that its entries take part in, all as many.
        flops: of the whole model.
        groups: the groups whose filters count.
        blocks: residual block -> the FLOPs of the operations of its branch.
        routed: parameters with an expert for each index of dimension 0.
    """

    def __init__(
        self,
        model: nn.Module,
        macs: Mapping[str, int],
        flops: int,
        groups: Sequence[Group],
        blocks: Mapping[Block, int] | None = None,
        routed: Collection[str] = (),
    ) -> None:
        self._extents = {name: list(p.shape) for name, p in model.named_parameters()}
        self._routed = frozenset(routed)
        self._per_entry = {
            name: 2 * macs[name] // self._worked(name)
            for name, extents in self._extents.items()
            if macs.get(name)
        }
        self._shrinking: dict[int, tuple[Group, _Shrinking]] = {}
        self._flops = flops
        self._params = sum(prod(extents) for extents in self._extents.values())
        self._filters = sum(group.size * group.filters_per_unit for group in groups)
        self._widths: Counter[str] = Counter()  # of each layer, the filters that count
        for group in groups:
            for slot in group.producers:
                self._widths[slot.owner] += slot.index.numel()
        self._whole = (self.cost, {n: list(e) for n, e in self._extents.items()}, +self._widths)
        #: FLOPs of a block that are no layer's, such as the products inside attention.
        self._beside = {
            block.name: total - sum(2 * macs.get(n, 0) for n in self._extents if block.holds(n))
            for block, total in (blocks or {}).items()
        }
        self._gone: set[str] = set()  # tensors and layers of blocks that have gone

    def _worked(self, name: str) -> int:
        """The entries of a parameter that its FLOPs are counted for: of experts those of one, since
        a token goes through as many of them whatever is left."""
        return prod(self._extents[name][int(name in self._routed) :])

    def reset(self) -> None:
        """Count nothing as gone."""
        whole, extents, widths = self._whole
        self._filters, self._params, self._flops = whole.filters, whole.params, whole.flops
        for name, sizes in extents.items():
            self._extents[name][:] = sizes
        self._widths = +widths
        self._gone.clear()

    def filters_of(self, block: Block) -> int:
        """The filters that count, of all layers of a block."""
        return sum(width for name, width in self._widths.items() if block.holds(name))

    def leave(self, block: Block, *, back: bool = False) -> None:
        """Count a block as gone, with all that is left of its layers, or as there again."""
        sign = 1 if back else -1
        self._filters += sign * self.filters_of(block)
        self._flops += sign * self._beside[block.name]
        names = {name for name in (*self._extents, *self._widths) if block.holds(name)}
        for name in names & self._extents.keys():
            self._params += sign * prod(self._extents[name])
            self._flops += sign * self._per_entry.get(name, 0) * self._worked(name)
        self._gone = self._gone - names if back else self._gone | names

    def take(self, group: Group, units: int) -> None:
        """Count `units` of the group as gone (back again if negative)."""
        if not units:
            return
        shrinking = self._of_unit(group)
        for owner, filters in shrinking.filters:
            self._widths[owner] -= units * filters
            self._filters -= 0 if owner in self._gone else units * filters
        for name, extents, per_entry, dims in shrinking.tensors:
            before = prod(extents)
            worked = self._worked(name) if per_entry else 0
            for dim, channels in dims:
                extents[dim] -= units * channels
            if name not in self._gone:
                self._params += prod(extents) - before
                self._flops += per_entry * (self._worked(name) - worked) if per_entry else 0

    def _of_unit(self, group: Group) -> _Shrinking:
        known = self._shrinking.get(id(group))
        if known is None or known[0] is not group:
            found: dict[str, list[tuple[int, int]]] = {}
            for entry in group.entries:
                if entry.tensor in self._extents:
                    found.setdefault(entry.tensor, []).append((entry.dim, entry.index.size(1)))
            shrinking = _Shrinking(
                [(slot.owner, slot.index.size(1)) for slot in group.producers],
                [
                    (name, self._extents[name], self._per_entry.get(name, 0), dims)
                    for name, dims in found.items()
                ],
            )
            # With the group, because another one may have its id in a copy of this meter.
            known = self._shrinking[id(group)] = group, shrinking
        return known[1]

    @property
    def cost(self) -> Cost:
        return Cost(self._filters, self._params, self._flops)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> its shape with the units gone; none of blocks that have gone."""
        return {name: tuple(e) for name, e in self._extents.items() if name not in self._gone}


class FlopCount(OperationMode):
    """Counts the FLOPs of operations, with the formulas of `torch.utils.flop_counter`.

    Attributes:
        total: so far.
        of_steps: of each operation that was run on its own, in order.
    """

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # imports Triton, which takes a second

        super().__init__()
        self._formulas = flop_registry
        self.total = 0
        self.of_steps: list[int] = []

    def restart(self) -> None:
        """Count from zero, for a run that begins anew."""
        self.total = 0
        self.of_steps.clear()

    def run(self, func: Any, args: tuple, kwargs: Mapping, made: Any = None) -> Any:
        """Run an operation; of a composite one, what it is made of is counted.

        Args:
            made: what a layer, or an operation without products, would return: it is counted and
                not run.
        """
        before = self.total
        out = self._run(func, args, kwargs, made)
        self.of_steps.append(self.total - before)
        return out

    def _run(self, func: Any, args: tuple, kwargs: Mapping, made: Any = None) -> Any:
        known = operation(func)
        if known.name in _LAYERS and args[0].dim() >= 2 and args[0].dim() >= args[1].dim():
            out = func(*args, **kwargs) if made is None else made
            self.total += 2 * out.numel() * prod(args[1].shape[1:])
            return out
        if known.name in RECURRENT:
            # Kernels of a whole layer, which processors and devices have, are in no table.
            weights = [t for value in args if isinstance(value, (list, tuple)) for t in value]
            entries = sum(weight.numel() for weight in weights if weight.dim() == 2)
            self.total += 2 * prod(args[0].shape[:-1]) * entries
            return func(*args, **kwargs) if made is None else made
        if known.composite and known.name not in _PRODUCTLESS:
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs) if made is None else made
        formula = self._formulas.get(func.overloadpacket)
        self.total += formula(*args, **kwargs, out_val=out) if formula else 0
        return out

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        return self._run(func, args, kwargs or {})

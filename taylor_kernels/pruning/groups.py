"""Coupled groups of a model, from Torch-Pruning's dependency graph.

Torch-Pruning traces which channels go together; here its groups become `Group`s: connected
components of channels, cut into units. What it does not say is added: the channels of a grouped
convolution are tied across its groups (the k-th of every group is one unit), so that removal keeps
the groups equal. Groups that cannot be masked exactly, or must not be pruned, are left out with
the reason; `check.py` then proves the rest on a copy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from math import gcd, lcm
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from taylor_kernels.pruning.tracing import trace
from taylor_kernels.pruning.units import BOTH, IN, OUT, Axis, Group, Slot, axes_of

#: They mix the channels they normalise or attend over: a masked channel is not a removed one.
_MIXING: tuple[type[nn.Module], ...] = (
    nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.MultiheadAttention, nn.RNNBase,
)  # fmt: skip
_SLICED = (_ConvNd, nn.Linear, nn.Embedding, nn.PReLU)


def find_groups(
    model: nn.Module,
    example_inputs: Any,
    ignored: Collection[str],
    frozen: Collection[str],
    round_to: int,
    min_filters: int,
) -> tuple[list[Group], dict[str, str]]:
    """The groups that can be pruned, and layer -> reason for the layers that cannot.

    Args:
        model: a copy to trace; its mode and requires_grad flags are changed.
        ignored: modules whose output filters stay.
        frozen: layers that the criterion cannot score.
    """
    graph = trace(model, example_inputs)
    components = _Components(model, ignored)
    for module in list(graph.module2node):
        if isinstance(module, (_ConvNd, nn.Linear)):
            components.add(graph, module)
    groups: list[Group] = []
    skipped: dict[str, str] = {}
    for group, reason in components.split(frozen, round_to, min_filters):
        if reason:
            for slot in group.producers:
                skipped.setdefault(slot.owner, reason)
        else:
            groups.append(group)
    groups.sort(key=lambda group: components.order[group.name])
    kept = {slot.owner for group in groups for slot in group.producers}
    return groups, {name: why for name, why in skipped.items() if name not in kept}


class _Components:
    """Connected components over all channels of a model."""

    def __init__(self, model: nn.Module, ignored: Collection[str]) -> None:
        self.modules = dict(model.named_modules())
        self.order = {name: number for number, name in enumerate(self.modules)}
        self.owners = {module: name for name, module in self.modules.items()}
        self.parameters = dict(model.named_parameters())
        self.uses: dict[Tensor, int] = {}
        for module in self.modules.values():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.uses[parameter] = self.uses.get(parameter, 0) + 1
        self.ignored = ignored
        self.offsets: dict[tuple[str, str], int] = {}
        self.count = 0
        self.edges: list[tuple[Tensor, Tensor]] = []
        self.followed: set[int] = set()  # offsets of slots that a group has taken along whole
        self.reasons: list[tuple[Tensor, str]] = []  # elements that a reason holds for

    def add(self, graph: Any, layer: nn.Module) -> None:
        """Take in what each output channel of a layer takes along."""
        how = graph.get_pruner_of_module(layer).prune_out_channels
        own, _ = self._slot(graph, graph.module2node[layer], how)
        assert own is not None
        start, width = self._offset(own), self._width(own)
        channels = torch.arange(start, start + width)
        if start in self.followed:
            return
        try:
            parts = self._follow(graph, layer, how, width)
        except Exception as error:
            # Its index arithmetic fails on reshapes and splits that it does not foresee.
            self.edges.append((channels, channels))
            self.reasons.append((channels, f"Torch-Pruning cannot follow its channels ({error!r})"))
            return
        touched, why = [channels], ""
        for part, root in parts:
            for item in part:
                where, reason = self._slot(graph, item.dep.target, item.dep.handler)
                why = why or reason
                if where is None:
                    continue
                index = torch.tensor(item.idxs)
                if index.max() >= self._width(where):
                    why = why or "Torch-Pruning misreads a reshape of its channels"
                    continue
                index += self._offset(where)
                roots = item.root_idxs if root is None else [root] * len(item.idxs)
                self.edges.append((torch.tensor(roots) + start, index))
                touched.append(index)
                if len(item.idxs) == self._width(where):
                    self.followed.add(self._offset(where))
        if why:
            self.reasons.append((torch.cat(touched), why))

    def _follow(
        self, graph: Any, layer: nn.Module, how: Any, width: int
    ) -> list[tuple[Any, int | None]]:
        """Torch-Pruning's groups for all output channels, with the channel if it was one alone."""
        group = graph.get_pruning_group(layer, how, list(range(width)))
        # Merging hides which indices of a layer go with each other when two ways lead to it (a
        # gate that multiplies two halves of one output). One index asked for alone shows that.
        if any(self._probe(graph, group, probe) for probe in {0, width // 2}):
            return [(graph.get_pruning_group(layer, how, [i]), i) for i in range(width)]
        return [(group, None)]

    @staticmethod
    def _probe(graph: Any, group: Any, root: int) -> bool:
        """Whether one channel of the root takes along more than the full group says."""
        if any(None in item.root_idxs for item in group):
            return True
        layer, how = group[0].dep.target.module, group[0].dep.handler
        alone = {
            (item.dep.target, item.dep.handler): set(item.idxs)
            for item in graph.get_pruning_group(layer, how, [root])
        }
        merged = {
            (item.dep.target, item.dep.handler): {
                index for index, of in zip(item.idxs, item.root_idxs, strict=True) if of == root
            }
            for item in group
        }
        return alone != {key: indices for key, indices in merged.items() if indices}

    def _slot(self, graph: Any, node: Any, handler: Any) -> tuple[tuple[str, str] | None, str]:
        """Where a dependency lands, None if it has no size, and why not to prune that, or ""."""
        from torch_pruning.ops import OPTYPE

        module = node.module
        if node.type == OPTYPE.OUTPUT:
            return None, "reaches the output of the model"
        if node.type == OPTYPE.PARAMETER:
            name = graph._param_to_name[module]
            owner = name.rpartition(".")[0]
            if isinstance(self.modules[owner], nn.RMSNorm):
                return None, f"RMSNorm {owner!r} mixes these channels"
            tied = "shares its parameter with another module" if self.uses[module] > 1 else ""
            return (name, f"dim {node.pruning_dim % module.dim()}"), tied
        if module not in self.owners or module not in graph.module2node:
            return None, ""
        name = self.owners[module]
        if isinstance(module, _MIXING):
            return None, f"{type(module).__name__} {name!r} mixes these channels"
        depthwise = node.type == OPTYPE.DEPTHWISE_CONV
        norm = node.type in (OPTYPE.BN, OPTYPE.IN)
        if not depthwise and not norm and not isinstance(module, _SLICED):
            return None, ""
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            return None, ""
        if depthwise or norm or isinstance(module, (nn.PReLU, nn.Embedding)):
            side = BOTH
        else:
            pruner = graph.get_pruner_of_module(module)
            side = OUT if handler == pruner.prune_out_channels else IN
        return (name, side), self._obstacle(name, module, side)

    def _obstacle(self, name: str, module: nn.Module, side: str) -> str:
        if side != IN and name in self.ignored:
            return f"{name!r} is ignored"
        if parametrize.is_parametrized(module) or "weight" not in module._parameters:
            return f"the weight of {name!r} is computed from other parameters"
        if any(self.uses[p] > 1 for p in module._parameters.values() if p is not None):
            return f"{name!r} shares a parameter with another module"
        depthwise = isinstance(module, _ConvNd) and side == BOTH
        if depthwise and module.in_channels != module.out_channels:
            return f"the groups of {name!r} join several input channels into one output"
        return ""

    def _width(self, where: tuple[str, str]) -> int:
        owner, side = where
        if side.startswith("dim "):
            return self.parameters[owner].size(int(side.removeprefix("dim ")))
        module = self.modules[owner]
        names = {
            IN: ("in_channels", "in_features"),
            OUT: ("out_channels", "out_features"),
            BOTH: ("num_features", "out_channels", "num_parameters", "embedding_dim"),
        }[side]
        return next(getattr(module, name) for name in names if hasattr(module, name))

    def _offset(self, where: tuple[str, str]) -> int:
        """The number of the first channel of a slot; its channels follow one another."""
        if where not in self.offsets:
            start, width = self.count, self._width(where)
            self.offsets[where] = start
            self.count += width
            module = self.modules.get(where[0])
            if isinstance(module, _ConvNd) and where[1] != BOTH and module.groups > 1:
                channels = torch.arange(width)
                first = channels % (width // module.groups)
                self.edges.append((channels + start, first + start))
        return self.offsets[where]

    def split(
        self, frozen: Collection[str], round_to: int, min_filters: int
    ) -> Iterator[tuple[Group, str]]:
        """Units of the same make, group by group, with the reason not to prune them or ""."""
        if not self.edges:
            return
        label = self._labels()
        touched = torch.zeros(self.count, dtype=torch.bool)
        for root, index in self.edges:
            touched[root], touched[index] = True, True
        why: dict[int, str] = {}
        for elements, reason in self.reasons:
            for unit in label[elements].unique().tolist():
                why.setdefault(unit, reason)

        channels: dict[int, dict[tuple[str, str], list[int]]] = {}
        for where, start in self.offsets.items():
            width = self._width(where)
            for channel, (unit, use) in enumerate(
                zip(
                    label[start : start + width].tolist(),
                    touched[start : start + width].tolist(),
                    strict=True,
                )
            ):
                if use:
                    channels.setdefault(unit, {}).setdefault(where, []).append(channel)
        kinds: dict[tuple, list[int]] = {}
        for unit, slots in channels.items():
            ordered = sorted(slots, key=lambda where: (self.order.get(where[0], -1), where[1]))
            make = tuple((where, len(slots[where])) for where in ordered)
            kinds.setdefault((make, why.get(unit, "")), []).append(unit)
        for (make, reason), units in kinds.items():
            wheres = [where for where, _ in make]
            units.sort(key=lambda unit: [channels[unit][where] for where in wheres])
            members = tuple(
                Slot(owner, side, torch.tensor([channels[u][owner, side] for u in units]), scored)
                for owner, side in wheres
                for scored in [self._scored((owner, side))]
            )
            if any(slot.producer for slot in members):
                yield self._group(members, reason, frozen, round_to, min_filters)

    def _group(
        self,
        slots: tuple[Slot, ...],
        reason: str,
        frozen: Collection[str],
        round_to: int,
        min_filters: int,
    ) -> tuple[Group, str]:
        producers = [slot for slot in slots if slot.producer]
        multiple = lcm(*(round_to // gcd(round_to, slot.index.size(1)) for slot in producers))
        least = max(-(-min_filters // slot.index.size(1)) for slot in producers)
        minimum = -(-least // multiple) * multiple
        axes: list[Axis] = [axis for slot in slots for axis in axes_of(self.modules, slot)]
        size = producers[0].index.size(0)
        group = Group(slots, tuple(axes), torch.arange(size), multiple, minimum)
        if not reason and all(slot.owner in frozen for slot in producers):
            reason = "its weights are frozen and this criterion reads their gradients"
        if not reason and not group.next_to_go(size):
            least = minimum * min(slot.index.size(1) for slot in producers)
            reason = f"it must keep all its filters (at least {least}, in units that go together)"
        return group, reason

    def _scored(self, where: tuple[str, str]) -> bool:
        module = self.modules.get(where[0])
        return where[1] in (OUT, BOTH) and isinstance(module, (_ConvNd, nn.Linear))

    def _labels(self) -> Tensor:
        """[count] int64: the least channel number that each channel is connected to."""
        label = torch.arange(self.count)
        one, other = (torch.cat(ends) for ends in zip(*self.edges, strict=True))
        while True:
            least = torch.minimum(label[one], label[other])
            before = label
            label = label.scatter_reduce(0, one, least, "amin").scatter_reduce(
                0, other, least, "amin"
            )
            label = label[label]
            if torch.equal(label, before):
                return label

"""`Channels`: what a trace says about a model, and the recipe for masking and removal."""

from __future__ import annotations

import copy
import itertools
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from taylor_kernels.tracing import attributes
from taylor_kernels.tracing.bare import bare_weight
from taylor_kernels.tracing.blocks import Block
from taylor_kernels.tracing.choosing import FREE, Choice
from taylor_kernels.tracing.drawing import write_page
from taylor_kernels.tracing.experts import Result
from taylor_kernels.tracing.multihead import prunable_attention
from taylor_kernels.tracing.record import NORM, Join, Reason, Record, Step, Vector
from taylor_kernels.tracing.residuals import find_blocks
from taylor_kernels.tracing.resolve import ambiguous, counted, resolve
from taylor_kernels.tracing.running import one_at_a_time, tensors_of_modules
from taylor_kernels.tracing.units import IN, OUT, Entry, Group, Place, Slot, collect, index


class Channels:
    """Which channels of a model go together, and why the others stay.

    It speaks in names, so it holds for the model and its copies alike.

    Attributes:
        groups: groups of interchangeable units, in the order of the model's layers.
        skipped: layer -> why none of its output channels can go.
        classes: parameter or buffer -> for each dimension [size] int64, the class of each index.
            Two places of one class go together. A shared tensor goes by its first name.
        layers: layer -> the classes of its input and output channels, as the layer counts them.
        macs: parameter -> the multiply-adds of the run that its entries took part in, each one as
            many as the others.
        bare: of the layers those that are no convolution or linear layer: weights that code uses
            by itself, named by the parameter, or by the module whose `weight` it is; and experts,
            by the module -> the parameters, and the dimension of each along which the outputs lie.
        outside: layer -> the module that uses its weight without calling the layer.
        norms: [(module, classes)] of every norm that works channel by channel, in running order.
        steps: the norms and products that channels go through, in running order, with classes in
            place of atoms.
        mixers: kind -> [(reason, classes)] of everything that mixes channels with each other.
        unread: parameters that the run did not compute with.
        choices: how each reshape that cuts channels was resolved.
        fills: tensor -> dimension -> what entries masked along it hold, where that is not zero;
            they are to be filled before those that are zeroed.

    Example:
        >>> import torch
        >>> from taylor_kernels.tracing import trace
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> channels = trace(model, torch.randn(1, 4))
        >>> dead = torch.arange(8) < 3
        >>> channels.entries([dead])["1.weight"]
        {1: tensor([0, 1, 2])}
        >>> channels.attributes([dead])
        {'0': {'out_features': 5}, '1': {'in_features': 5}}
    """

    def __init__(self, record: Record, modules: Mapping[str, nn.Module]) -> None:
        self._record = record
        resolution, across = resolve(record)
        roots = np.flatnonzero(resolution.label == np.arange(record.count))
        number = np.zeros(record.count, np.int64)
        number[roots] = np.arange(roots.size)
        self._label = number[resolution.label]
        self._why = resolution.why[roots]
        self._reasons = resolution.reasons
        self.choices: list[Choice] = resolution.choices
        self.fills = dict(record.fills)
        self._classes: dict[tuple[str, int], Vector] = {}
        same: dict[bytes, Vector] = {}  # most vectors are the same as some others
        for start, name, dim, size in record.starts:
            vector = self._label[start : start + size]
            self._classes[name, dim] = same.setdefault(vector.tobytes(), vector)
        parameters, buffers = tensors_of_modules(modules)
        self._order = {name: number for number, name in enumerate(modules)}
        self._layers: dict[str, tuple[Vector, Vector]] = {}
        self.macs: dict[str, int] = {}
        self.outside: dict[str, str] = {}
        self.bare: dict[str, tuple[tuple[str, int], ...]] = {}
        for product in record.products:
            bare = bare_weight(record, product, modules)
            name = product.module if bare is None else bare.name
            if name in self._layers:
                pass
            elif bare is None:
                sides = self._label[product.inputs], self._label[product.outputs]
                self._layers[name] = sides
            else:
                dims = (bare.inputs, bare.outputs)
                inputs, outputs = (self._classes[product.weight, dim] for dim in dims)
                self._layers[name] = inputs, outputs
                self.bare[name] = ((product.weight, bare.outputs),)
                self._order.setdefault(name, self._order.get(product.module, -1))
            self.macs[product.weight] = self.macs.get(product.weight, 0) + product.macs
            if product.caller != product.module:
                self.outside[name] = product.caller
        for mixture in record.mixtures:
            self._layers[mixture.experts] = np.zeros(0, np.int64), self._label[mixture.atoms]
            self.bare[mixture.experts] = tuple((part, 0) for part in mixture.parts)
        self._mixtures = {m.router: (m, self._label[m.atoms]) for m in record.mixtures}
        # A layer that ran, and whose weight was none of the model's tensors.
        for name, module in modules.items():
            if name in record.ran and isinstance(module, (nn.Linear, _ConvNd)):
                self._layers.setdefault(name, (np.zeros(0, np.int64), np.zeros(0, np.int64)))
        self._publish()
        self.norms = [(norm.module, index(self._label[norm.atoms])) for norm in record.norms]
        self.steps: list[Step] = [
            step.of(self._label[step.inputs], self._label[step.outputs]) for step in record.steps
        ]
        self._across = {call.module: (call.dim, self._label[call.vectors[0]]) for call in across}
        self.mixers: dict[str, list[tuple[Reason, Tensor]]] = {}
        for atoms, reason in record.fixed:
            if reason.mixer and (atoms := atoms[atoms != 0]).size:
                entry = (reason, index(np.unique(self._label[atoms])))
                self.mixers.setdefault(reason.mixer, []).append(entry)
        self.unread = {
            name
            for start, name, _, _ in record.starts
            if name not in buffers and start not in record.seen
        }
        self._sizes = self._counted(modules, {**parameters, **buffers})
        self.groups: list[Group] = []
        self.skipped: dict[str, str] = {}
        self._make_groups()

    def _publish(self) -> None:
        """Vectors of classes as tensors."""
        self.classes: dict[str, tuple[Tensor, ...]] = {}
        known: dict[int, Tensor] = {}
        for (name, _), vector in self._classes.items():
            if (key := id(vector)) not in known:
                known[key] = index(vector)
            self.classes[name] = (*self.classes.get(name, ()), known[key])
        self.layers: dict[str, tuple[Tensor, Tensor]] = {
            name: (index(inputs), index(outputs))
            for name, (inputs, outputs) in self._layers.items()
        }

    # Groups

    def _make_groups(self) -> None:
        ordered = sorted(self._layers, key=lambda name: self._order.get(name, -1))
        places: list[Place] = [((name, OUT), self._layers[name][1]) for name in ordered]
        produced = np.zeros(self._why.size, bool)
        for _, vector in places:
            produced[vector] = True
        places += [((name, IN), self._layers[name][0]) for name in ordered]
        places += list(self._classes.items())
        free = produced & (self._why == FREE)
        made = [item for item in collect(places, free) if len(item[0]) > 1]
        group_of = np.full(self._why.size, -1)
        for number, (classes, _) in enumerate(made):
            group_of[classes] = number
        norms: list[dict[str, None]] = [{} for _ in made]
        behind_norms = [group_of[self._label[norm.atoms]] for norm in self._record.norms]
        for norm, numbers in zip(self._record.norms, behind_norms, strict=True):
            for number in dict.fromkeys(numbers.tolist()):
                if number >= 0:
                    norms[number][norm.module] = None
        for (classes, table), behind in zip(made, norms, strict=True):
            slots = [
                Slot(owner, side, rows)
                for (owner, side), rows in table.items()
                if isinstance(side, str)
            ]
            entries = [
                Entry(tensor, dim, rows, self.fills.get(tensor, {}).get(dim, 0.0))
                for (tensor, dim), rows in table.items()
                if isinstance(dim, int)
            ]
            slots.sort(key=lambda slot: self._order.get(slot.owner, -1))
            group = Group(tuple(slots), tuple(entries), classes, tuple(behind))
            self.groups.append(group)
        self.groups.sort(key=lambda group: self._order.get(group.name, -1))
        offered = {slot.owner for group in self.groups for slot in group.producers}
        for name in ordered:
            if name not in offered:
                self.skipped[name] = self._why_not(self._layers[name][1])

    def _why_not(self, classes: Vector) -> str:
        if not classes.size:
            return "its weight is computed in a way that cannot be followed"
        kept = self._why[classes]
        first = int(kept.min())
        if first == FREE:
            return "its channels all go together, and one has to stay"
        return str(self._reasons[first])

    def reason(self, number: int) -> Reason | None:
        """Why the channels of a class cannot go; None if they can."""
        why = int(self._why[number])
        return None if why == FREE else self._reasons[why]

    def offering(self, groups: Sequence[Group]) -> Channels:
        """The same channels with these groups: some of its own, which a caller may have changed."""
        other = copy.copy(self)
        other.groups = list(groups)
        return other

    @property
    def normalised_together(self) -> Tensor:
        """[classes] bool: those that a norm across channels reads."""
        read = np.zeros(self._why.size, bool)
        for _, vector in self._across.values():
            read[vector] = True
        return torch.from_numpy(read)

    def gone_at_zero(self) -> Channels:
        """The same channels with the groups only whose units are as good as gone at zero.

        That is all that no norm across channels reads: `kept_by_norms` has nothing to say of them.
        """
        read = self.normalised_together
        other = self.offering([g for g in self.groups if not read[g.classes].any()])
        reason = "is normalised together with other channels, among which a zero counts"
        others = {slot.owner for group in self.groups for slot in group.producers}
        others -= {slot.owner for group in other.groups for slot in group.producers}
        other.skipped = self.skipped | dict.fromkeys(sorted(others), reason)
        return other

    def without(self, dead: Sequence[Tensor]) -> Channels:
        """The channels of the model from which the dead units have been removed.

        Classes keep their numbers, so `Group.classes` says which units are left.

        Args:
            dead: for each group [U] bool, True for units that went.
        """
        gone = self._gone(dead)

        def left(vector: Vector) -> Vector:
            return vector[~gone[vector]]

        moved: dict[tuple[str, str | int], Vector] = {
            key: np.cumsum(~gone[vector]) - 1 for key, vector in self._classes.items()
        }
        for name, sides in self._layers.items():
            for side, vector in zip((IN, OUT), sides, strict=True):
                moved[name, side] = np.cumsum(~gone[vector]) - 1
        other = copy.copy(self)
        vectors = {id(vector): vector for vector in self._classes.values()}
        fewer = {key: left(vector) for key, vector in vectors.items()}
        other._classes = {key: fewer[id(vector)] for key, vector in self._classes.items()}
        other._layers = {name: (left(i), left(o)) for name, (i, o) in self._layers.items()}
        other._publish()
        other.norms = [(name, index(left(classes.numpy()))) for name, classes in self.norms]
        other.steps = [step.of(left(step.inputs), left(step.outputs)) for step in self.steps]
        other._across = {name: (dim, left(vector)) for name, (dim, vector) in self._across.items()}
        other._mixtures = {name: (m, left(vector)) for name, (m, vector) in self._mixtures.items()}
        other._sizes = [(*which, left(vector)) for *which, vector in self._sizes]
        other.groups = [
            group.without(mask, moved) for group, mask in zip(self.groups, dead, strict=True)
        ]
        return other

    def find_blocks(self, model: nn.Module) -> tuple[list[Block], dict[str, str]]:
        """The residual blocks that can go, and of other sums of a tensor and of what was made of
        it, by the module that adds them, why they cannot.

        Args:
            model: the traced model or a copy of it.

        Raises:
            RuntimeError: the trace has not followed where tensors come from.
        """
        if self._record.values is None:
            raise RuntimeError("find_blocks: not traced for that; pass trace(..., blocks=True)")
        return find_blocks(self._record.values, model, self._layers)

    def coupled(self, model: nn.Module, layers: Collection[str]) -> Channels | None:
        """The channels where sizes that code wrote down are those of other tensors.

        `y.reshape(n, c, -1)` says nothing of where c is from. Here it is taken from the first other
        tensor that the code had at hand and that is as wide, so that both lose the same channels.
        An attribute that sizes several tensors, which need not be the same by what they are made
        of (queries and values of a non-local block), is taken to be the size of all of them.

        Args:
            model: the traced model or a copy of it.
            layers: only sizes that count channels which one of these layers makes.

        Returns:
            None where there are no such sizes.
        """
        asked = np.zeros(self._why.size, bool)
        for name in layers:
            asked[self._layers[name][1]] = True
        asked[0] = False
        joins = []
        for echo in self._record.echoes:
            mine = self._label[echo.vector]
            others = (o for o in echo.others if not np.array_equal(self._label[o], mine))
            other = next(others, None)
            if other is not None and (asked[mine].any() or asked[self._label[other]].any()):
                joins.append(Join(echo.vector, other, echo.where, len(self._record.fixed)))
        shared = ambiguous(self._record.sizes)
        shared = {
            (size.module, size.attribute)
            for size in self._record.sizes
            if (size.module, size.attribute) in shared and asked[self._label[size.atoms]].any()
        }
        if not joins and not shared:
            return None
        sizes = [
            replace(size, weak=size.weak and (size.module, size.attribute) not in shared)
            for size in self._record.sizes
        ]
        record = replace(self._record, joins=[*self._record.joins, *joins], sizes=sizes)
        with one_at_a_time(), prunable_attention(model):
            return Channels(record, dict(model.named_modules()))

    def leaving(self, blocks: Sequence[Block]) -> Channels:
        """The channels of the model without these blocks.

        The groups and their units stay the same ones; a group all of whose layers have gone has
        neither slots nor entries.
        """

        def gone(name: str) -> bool:
            return any(block.holds(name) for block in blocks)

        other = copy.copy(self)
        other._classes = {key: v for key, v in self._classes.items() if not gone(key[0])}
        other._layers = {name: sides for name, sides in self._layers.items() if not gone(name)}
        other._publish()
        other.norms = [(name, classes) for name, classes in self.norms if not gone(name)]
        other._across = {name: found for name, found in self._across.items() if not gone(name)}
        other._mixtures = {name: m for name, m in self._mixtures.items() if not gone(name)}
        stays = [not gone(step.module) and not gone(step.layer) for step in self.steps]
        number = np.cumsum(stays) - 1
        other.steps = []
        for step in itertools.compress(self.steps, stays):
            kept = step.of(step.inputs, step.outputs)
            kept.sources = frozenset(int(number[n]) for n in step.sources if stays[n])
            other.steps.append(kept)
        other._sizes = [size for size in self._sizes if not gone(size[0])]
        other.groups = [
            replace(
                group,
                slots=tuple(slot for slot in group.slots if not gone(slot.owner)),
                entries=tuple(entry for entry in group.entries if not gone(entry.tensor)),
                norms=tuple(name for name in group.norms if not gone(name)),
            )
            for group in self.groups
        ]
        return other

    # The recipe

    def entries(self, dead: Sequence[Tensor]) -> dict[str, dict[int, Tensor]]:
        """What goes with the dead units: tensor -> dimension -> indices [n] ascending.

        Masking fills these with zeros (with `fills` where a tensor is named there); removal
        deletes them, from the tensor, its gradient and optimizer state of its shape.

        Args:
            dead: for each group [U] bool, True for units that go.
        """
        gone = self._gone(dead)
        found: dict[str, dict[int, Tensor]] = {}
        known: dict[int, Tensor | None] = {}
        for (name, dim), vector in self._classes.items():
            if (key := id(vector)) not in known:
                places = np.flatnonzero(gone[vector])
                known[key] = index(places) if places.size else None
            if (going := known[key]) is not None:
                found.setdefault(name, {})[dim] = going
        return found

    def kept_by_norms(self, dead: Sequence[Tensor]) -> dict[str, tuple[int, Tensor]]:
        """What masking the dead units asks of norms across channels.

        A norm whose statistics are of all its channels (LayerNorm, RMSNorm, GroupNorm of one group)
        has to be run on the channels that are kept, so that masking is removal.

        Args:
            dead: for each group [U] bool, True for units that go.

        Returns:
            Module -> the channels' dimension in its input, from the end, and the indices [n] of
            those that stay; only modules of which some go.
        """
        gone = self._gone(dead)
        return {
            name: (dim, index(np.flatnonzero(~gone[vector])))
            for name, (dim, vector) in self._across.items()
            if gone[vector].any()
        }

    def kept_by_routers(
        self, dead: Sequence[Tensor]
    ) -> dict[str, tuple[Tensor, tuple[Result, ...]]]:
        """What masking the dead units asks of routers: to choose among the experts that are kept.

        Args:
            dead: for each group [U] bool, True for units that go.

        Returns:
            Router -> the numbers [n] of the experts that stay, and what the router returns; only
            routers some of whose experts go.
        """
        gone = self._gone(dead)
        return {
            name: (index(np.flatnonzero(~gone[vector])), mixture.results)
            for name, (mixture, vector) in self._mixtures.items()
            if gone[vector].any()
        }

    def experts_needed(self, group: Group) -> int:
        """So many units of a group stay at least, of which a router chooses that many for each
        token; 0 where the units are no experts."""
        mine = group.classes.numpy()
        counts = [m.top_k for m, vector in self._mixtures.values() if np.isin(vector, mine).any()]
        return max(counts, default=0)

    @property
    def routed(self) -> set[str]:
        """Parameters with an expert for each index of dimension 0, of which a token goes through as
        many, however many there are."""
        return {part for mixture, _ in self._mixtures.values() for part in mixture.parts}

    def attributes(self, dead: Sequence[Tensor]) -> dict[str, dict[str, Any]]:
        """What removing the dead units makes of module attributes: module -> attribute -> value.

        An integer stays an integer, a tuple or list of them a tuple or list.

        Args:
            dead: for each group [U] bool, True for units that go.
        """
        return attributes.shrunk(self._sizes, self._gone(dead))

    def _gone(self, dead: Sequence[Tensor]) -> Vector:
        if len(dead) != len(self.groups):
            raise ValueError(
                f"dead: expected {len(self.groups)} masks, one a group, got {len(dead)}"
            )
        gone = np.zeros(self._why.size, bool)
        for group, mask in zip(self.groups, dead, strict=True):
            if mask.shape != group.classes.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"dead: the mask of group {group.name!r} must be {group.size} bools, got "
                    f"{mask.dtype} of shape {tuple(mask.shape)}"
                )
            gone[group.classes[mask.cpu()].numpy()] = True
        return gone

    def _counted(
        self, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
    ) -> list[tuple[str, str, Any, Vector]]:
        """Attributes that count channels: module, attribute, value, classes counted."""
        found: list[tuple[str, str, Any, Vector]] = []
        firsts: dict[int, str] = {}
        for name, tensor in tensors.items():
            firsts.setdefault(id(tensor), name)
        groups = {p.module: p.groups for p in self._record.products if p.groups is not None}
        norms = {norm.module: self._label[norm.atoms] for norm in self._record.norms}
        norms |= {s.module: s.outputs for s in self.steps if s.output_dim and s.kind == NORM}
        for name, module in modules.items():
            for attribute, what in attributes.rules_of(module).items():
                vector = None
                if isinstance(what, tuple):
                    first = firsts.get(id(_inside(module, what[0])), "")
                    vector = self._classes.get((first, what[1]))
                elif what == "groups":
                    vector = self._label[groups[name]] if name in groups else None
                elif what == "norm":
                    # Its vectors first: an InstanceNorm is run on channels repeated by example.
                    own = [firsts.get(id(t), "") for t in (module.weight, module.running_mean)]
                    vectors = [self._classes[o, 0] for o in own if (o, 0) in self._classes]
                    vector = vectors[0] if vectors else norms.get(name)
                elif name in self._layers:
                    vector = self._layers[name][what == "outputs"]
                old = getattr(module, attribute, None)
                if vector is not None and old is not None:
                    found.append((name, attribute, old, vector))
        for size in counted(self._record.sizes):
            listed, _, place = size.attribute.partition("[")
            kept = getattr(modules[size.module], listed) if place else 0
            found.append((size.module, size.attribute, kept, self._label[size.atoms]))
        return found

    # For people

    def table(self) -> str:
        """The groups and the layers that they run through, then the layers that are left out."""
        lines = []
        for group in self.groups:
            per = sum(slot.index.size(1) for slot in group.producers)
            through = ", ".join(f"{slot.owner or 'model'}.{slot.side}" for slot in group.slots)
            lines.append(f"{group.name:<32} {group.size:>6} units of {per:>4}  {through}")
        lines += [f"{name or 'model':<32} stays: {why}" for name, why in self.skipped.items()]
        wrap = textwrap.TextWrapper(
            100, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False
        )
        return "\n".join(wrap.fill(line) for line in lines)

    def show(self, path: str | Path) -> Path:
        """Draw the groups and the layers that they run through: one HTML file, nothing to load.

        Args:
            path: where to write it.

        Returns:
            The path.

        Example:
            >>> import tempfile, torch
            >>> from taylor_kernels.tracing import trace
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
            >>> folder = tempfile.mkdtemp()
            >>> trace(model, torch.randn(1, 4)).show(f"{folder}/channels.html").name
            'channels.html'
        """
        return write_page(self, Path(path))

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        units = sum(group.size for group in self.groups)
        return f"Channels({len(self.groups)} groups, {units} units, {len(self.skipped)} skipped)"


def _inside(module: nn.Module, name: str) -> object:
    """An attribute of a module, or of modules in it; None if there is no such."""
    found: object = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found

"""`Channels`: what a trace says about a model, and the recipe for masking and removal."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from taylor_kernels.tracing.answer.alternatives import Alternatives
from taylor_kernels.tracing.answer.consequences import Consequences
from taylor_kernels.tracing.answer.drawing import table, write_page
from taylor_kernels.tracing.answer.grouping import find_groups
from taylor_kernels.tracing.answer.layers import find_layers
from taylor_kernels.tracing.answer.residuals import find_blocks
from taylor_kernels.tracing.answer.surroundings import Surroundings
from taylor_kernels.tracing.answer.units import Group, index
from taylor_kernels.tracing.answer.vectors import Vectors, find_dims, find_vectors, numbered
from taylor_kernels.tracing.answer.wording import units_in_words
from taylor_kernels.tracing.blocks import Block
from taylor_kernels.tracing.notes.atoms import Reason, Vector
from taylor_kernels.tracing.notes.record import Record
from taylor_kernels.tracing.resolving.arrangement import arranged
from taylor_kernels.tracing.resolving.choosing import Choice
from taylor_kernels.tracing.resolving.grids import FREE
from taylor_kernels.tracing.resolving.resolve import resolve
from taylor_kernels.tracing.run.running import tensors_of_modules


class Channels(Consequences, Alternatives, Surroundings):
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
        input_dims: parameter -> the dimension that its inputs lie along, from the end, if all its
            products are by its own values, or slices of them, and it is one dimension.
        norms: [(module, classes)] of every norm that works channel by channel, in running order.
        steps: the norms and products that channels go through, in running order, with classes in
            place of atoms.
        mixers: kind -> [(reason, classes)] of everything that mixes channels with each other.
        unread: parameters and buffers that the run in eval mode did not compute with.
        written: parameters and buffers that the model's code writes into as it runs.
        trained: train mode does more than eval mode, and was looked at too.
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
        resolved = resolve(record)
        resolution, record = resolved.resolution, resolved.record
        self._record = record
        label, roots = numbered(resolution.label)
        self._label = label
        self._why = resolution.why[roots]
        self._reasons = resolution.reasons
        self.choices: list[Choice] = resolution.choices
        self.fills = dict(record.fills)
        dims = find_dims(record, label)
        parameters, buffers = tensors_of_modules(modules)
        layers = find_layers(record, label, dims, modules, parameters)
        self.macs, self.outside, self.bare = layers.macs, layers.outside, layers.bare
        self.input_dims = layers.input_dims
        transposed = {n for n, m in modules.items() if isinstance(m, _ConvTransposeNd)}
        self._transposed = transposed & layers.sides.keys()
        tensors = {**parameters, **buffers}
        arrangement = arranged(record, label)
        self._whole = vectors = find_vectors(
            record, label, dims, layers.sides, resolved, modules, tensors, arrangement
        )
        self._before = np.zeros(roots.size, bool)
        self._publish(vectors)
        self.mixers: dict[str, list[tuple[Reason, Tensor]]] = {}
        for atoms, reason in record.fixed:
            if reason.mixer and (atoms := atoms[atoms != 0]).size:
                entry = (reason, index(np.unique(label[atoms])))
                self.mixers.setdefault(reason.mixer, []).append(entry)
        free = self._why == FREE
        stages = arrangement.stages
        self.groups = find_groups(layers, dims, vectors.norms, self.fills, free, stages)
        self.unread, self.trained = set(record.unread), record.trained
        self.written = set(record.written)
        offered = {slot.owner for group in self.groups for slot in group.producers}
        self.skipped = {
            name: self._why_not(name, layers.sides[name][1])
            for name in sorted(layers.sides, key=layers.place)
            if name not in offered
        }

    def _publish(self, vectors: Vectors) -> None:
        """Work on these vectors, and give them out as tensors."""
        self._vectors = vectors
        self._least_normed: Vector | None = None  # of each class, as `least_normalised` says
        self.classes: dict[str, tuple[Tensor, ...]] = {}
        known: dict[int, Tensor] = {}
        for (name, _), vector in vectors.dims.items():
            if (key := id(vector)) not in known:
                known[key] = index(vector)
            self.classes[name] = (*self.classes.get(name, ()), known[key])
        self.layers: dict[str, tuple[Tensor, Tensor]] = {
            name: (index(inputs), index(outputs))
            for name, (inputs, outputs) in vectors.layers.items()
        }
        self.norms = [(name, index(vector)) for name, vector in vectors.norms]
        self.steps = vectors.steps

    def _why_not(self, layer: str, classes: Vector) -> str:
        if not classes.size:
            stopped = self._stopped(layer)
            return str(stopped or "its weight is computed in a way that cannot be followed")
        kept = self._why[classes]
        first = int(kept.min())
        if first == FREE:
            return "its channels all go together, and one has to stay"
        return str(self._reasons[first])

    def reason(self, number: int) -> Reason | None:
        """Why the channels of a class cannot go; None if they can."""
        why = int(self._why[number])
        return None if why == FREE else self._reasons[why]

    def why_no_layer(self, name: str) -> str:
        """Why a layer's module is none of `layers`."""
        return str(self._stopped(name) or "is not reached on the example inputs in eval mode")

    def _stopped(self, layer: str) -> Reason | None:
        """What the weight of a layer met that keeps it, on its way to a product."""
        numbers = (
            int(number)
            for name, _ in self.weights_of(layer)
            if name not in self.unread
            for classes in self.classes.get(name, ())
            for number in classes
        )
        return next(filter(None, map(self.reason, numbers)), None)

    def weights_of(self, layer: str) -> tuple[tuple[str, int], ...]:
        """The parameters that a layer multiplies by, and the dimension of each along which its
        outputs lie.

        They are those of `bare`, or the layer's own `weight`, whether or not a parametrization
        computes it. In a transposed convolution of several groups these are the outputs of each.
        """
        name = f"{layer}.weight" if layer else "weight"
        return self.bare.get(layer, ((name, int(layer in self._transposed)),))

    def offering(self, groups: Sequence[Group]) -> Channels:
        """The same channels with these groups: some of its own, which a caller may have changed."""
        other = copy.copy(self)
        other.groups = list(groups)
        return other

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
        other = copy.copy(self)
        other._before = self._before | gone
        other._publish(self._whole.without_classes(other._before))
        after = self._vectors.places_after(gone, other._vectors)
        other.groups = [
            group.without(mask, after) for group, mask in zip(self.groups, dead, strict=True)
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
        return find_blocks(self._record.values, model, self._vectors.layers)

    def leaving(self, blocks: Sequence[Block]) -> Channels:
        """The channels of the model without these blocks.

        The groups and their units stay the same ones; a group all of whose layers have gone has
        neither slots nor entries.
        """

        def gone(name: str) -> bool:
            return any(block.holds(name) for block in blocks)

        other = copy.copy(self)
        other._publish(self._vectors.without_modules(gone))
        other._whole = self._whole.without_modules(gone)
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

    # For people

    def table(self) -> str:
        """The groups and the layers that they run through, then the layers that are left out."""
        return table(self.groups, units_in_words(self), self.skipped)

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
        return write_page(Path(path), self.layers, self.groups, units_in_words(self), self.skipped)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        units = sum(group.size for group in self.groups)
        return f"Channels({len(self.groups)} groups, {units} units, {len(self.skipped)} skipped)"

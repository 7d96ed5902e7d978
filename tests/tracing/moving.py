"""Ground truth for labels: what moves once the parameters of a unit do, and nothing reads it.

The entries by which layers read a unit are zeroed, so that a change of the unit ends where it is
read. Then what makes it is changed, one layer at a time while the others that make it are masked,
as factors of one product may (queries and keys). What moves of the inputs of all layers has to be
just the channels that carry the unit's label, and the outputs of the model must not move at all.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.tracing import Channels
from tests.tracing.removal import noisy, none_dead, outputs

#: A tensor, a dimension and indices along it.
Entry = tuple[str, int, Tensor]

#: A ReLU may hide one change, and hides not all of these.
TRIES = 4


@dataclass
class Parts:
    """The entries of a unit: by layer those that make it, those that read it, and the others, of
    norms and of layers that a channel passes without meeting others."""

    made: dict[str, list[Entry]] = field(default_factory=dict)
    read: list[Entry] = field(default_factory=list)
    passed: list[Entry] = field(default_factory=list)


def parts_of(channels: Channels, number: int, unit: int) -> Parts:
    """What goes with a unit of a group, by what it does there."""
    dead = none_dead(channels)
    dead[number][unit] = True
    group, found = channels.groups[number], Parts()
    through = {slot.owner for slot in group.slots if slot.side == "in"}
    makers = {slot.owner for slot in group.producers}
    weights = {
        name: (layer, dim) for layer in channels.layers for name, dim in channels.weights_of(layer)
    }
    for name, dims in channels.entries(dead).items():
        before, _, leaf = name.partition(".parametrizations.weight.")
        layer, out = weights.get(f"{before}.weight" if leaf else name, (None, 0))
        passes = layer in through & makers and len(dims) == 1
        recurrent = name.rpartition(".")[2].startswith(("weight_ih", "weight_hh"))
        for dim, places in dims.items():
            entry = (name, dim, places)
            owner = layer or name.rpartition(".")[0]
            if dim != out if layer and not passes else recurrent and dim == 1:
                found.read.append(entry)
            elif passes or owner not in makers:
                found.passed.append(entry)
            else:
                found.made.setdefault(owner, []).append(entry)
    return found


class Watched:
    """A float64 model whose parameters are changed and put back, and the inputs of its layers."""

    def __init__(self, model: nn.Module, inputs: Any, channels: Channels, seed: int) -> None:
        self.model, self.inputs = noisy(model, inputs, seed)
        self.channels = channels
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, buffer in self.model.named_buffers():
            if name.endswith("running_mean"):  # it is zero, which no factor changes
                buffer.add_(torch.rand(buffer.shape, generator=self.generator))
        self.dims = {
            name: 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
            for name, module in self.model.named_modules()
            if name in channels.layers and isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        }
        self.seen: dict[str, list[Tensor]] = {}
        self.alive: dict[str, Tensor | bool] = {}
        for name in self.dims:
            self.model.get_submodule(name).register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        return lambda _, given: self.seen.setdefault(name, []).append(given[0].clone())

    def run(self) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
        self.seen = {}
        found = outputs(self.model, self.inputs)
        return self.seen, found

    def fill(self, entries: Sequence[Entry]) -> None:
        fills = self.channels.fills
        for name, dim, places in entries:
            fill = fills.get(name, {}).get(dim, 0.0)
            self.tensors[name].index_fill_(dim, places, fill)

    @contextmanager
    def kept(self, parts: Parts) -> Iterator[None]:
        """What is changed inside is put back."""
        every = [*parts.read, *parts.passed, *(e for made in parts.made.values() for e in made)]
        before = {name: self.tensors[name].clone() for name, _, _ in every}
        try:
            yield
        finally:
            for name, value in before.items():
                self.tensors[name].copy_(value)

    def change(self, parts: Parts, makers: Sequence[str], step: Sequence[Tensor]) -> None:
        """Add to what these layers make the unit by, and multiply what it passes."""
        own = [entry for maker in makers for entry in parts.made[maker]]
        for (name, dim, places), more in zip(own, step, strict=True):
            self.tensors[name].index_add_(dim, places, more)
        for name, dim, places in parts.passed:
            tensor = self.tensors[name]
            tensor.index_copy_(dim, places, 1.5 * tensor.index_select(dim, places))

    def steps(self, parts: Parts, makers: Sequence[str]) -> list[Tensor]:
        return [
            2
            * torch.randn(
                self.tensors[name].index_select(dim, places).shape,
                generator=self.generator,
                dtype=torch.float64,
            )
            for maker in makers
            for name, dim, places in parts.made[maker]
        ]

    def moved(
        self, parts: Parts, makers: Sequence[str], step: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], bool]:
        """For each layer which of its input channels move, and whether an output does. What is zero
        in all runs, as code that shifts an image leaves its rim, is noted in `alive`."""
        with self.kept(parts):
            for other, made in parts.made.items():
                if other not in makers:
                    self.fill(made)
            self.fill(parts.read)
            before, output = self.run()
            self.change(parts, makers, step)
            self.fill(parts.read)
            after, other_output = self.run()
        moves = {}
        for name, dim in self.dims.items():
            pairs = zip(before.get(name, []), after.get(name, []), strict=True)
            calls = [(one != two).movedim(dim, 0).flatten(1).any(1) for one, two in pairs]
            if calls:
                moves[name] = torch.stack(calls).any(0)
                live = [(two != 0).movedim(dim, 0).flatten(1).any(1) for two in after[name]]
                self.alive[name] = self.alive.get(name, False) | torch.stack(live).any(0)
        same = all(torch.equal(one, two) for one, two in zip(output, other_output, strict=True))
        return moves, not same


def faults_of_labels(
    model: nn.Module, inputs: Any, channels: Channels, seed: int, most: int = 2
) -> list[str]:
    """Where what moves is not what the labels say, for some units of each group."""
    found = []
    draw = random.Random(seed)
    watched = Watched(model, inputs, channels, seed)
    with torch.no_grad():
        for number, group in enumerate(channels.groups):
            for unit in draw.sample(range(group.size), min(most, group.size)):
                if fault := _fault(watched, parts_of(channels, number, unit), group, unit):
                    found.append(f"unit {unit} of {group.size} of {group.name!r}: {fault}")
    return found


def _fault(watched: Watched, parts: Parts, group: Any, unit: int) -> str:
    layers, label = watched.channels.layers, int(group.classes[unit])
    expected = {name: layers[name][0] == label for name in watched.dims}
    missing = {name: mask.clone() for name, mask in expected.items()}
    alone = [[maker] for maker in parts.made]
    for attempt in range(TRIES):
        # Factors of one product that different layers make move together, or not at all.
        together = [list(parts.made)] if attempt else []
        for makers in (*alone, *together):
            step = watched.steps(parts, makers)
            for sign in (1, -1):
                moves, output = watched.moved(parts, makers, [sign * one for one in step])
                for name, moved in moves.items():
                    if len(makers) == 1 and (extra := moved & ~expected[name]).any():
                        return f"{makers} moves {extra.nonzero().flatten().tolist()} of {name!r}"
                    missing[name] &= ~moved
                if output and len(makers) == 1:
                    return f"{makers} moves the output"
        if not any(mask.any() for mask in missing.values()):
            return ""
    for name, mask in missing.items():
        mask &= watched.alive.get(name, False)
    if not any(mask.any() for mask in missing.values()):
        return ""
    still = {name: m.nonzero().flatten().tolist() for name, m in missing.items() if m.any()}
    return f"does not move {still}"

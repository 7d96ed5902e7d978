"""Where the gates of channels stand, read off a trace.

A gate of 1 multiplies all channels that go together. Removing them makes them zero wherever they
are read, so the slope of the loss in the gate is the sum of those at its sites: so chosen that
every path from the layers that make the channels to those that read them passes exactly one.

- what made the channels last before they are read: the norm, or the layer where no norm is on the
  path. In front of a norm a gate has no slope in train mode, since the norm divides it out.
- the input of a reader, for itself alone, that also receives channels which go on to a norm
  elsewhere: a convolution that reads the stream of a pre-activation network, say.
- the input of a reader behind an attention, whose products of activations pass the channels on: of
  a head its slice of the context vector. In front of the attention stand its queries, keys and
  values, and a factor on all three is not one on what the head adds.

A depthwise convolution with a norm behind it is on the way, not a reader. A layer's weight that
other code multiplies by, as nn.MultiheadAttention does by that of its `out_proj`, is met in
functional.linear. What cannot be met so is no site: its readers' inputs stand in for it, and where
those are out of reach too, the outputs of the layers that made the channels, or no gate can stand.
Then a slope over the minibatch may still be had, from the gradient of a reader's weight: so have
neurons of stacked experts one, and the experts themselves.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from taylor_kernels.statistics.hooks.sites import (
    AT_GRADIENT,
    AT_MODULE,
    AT_PRODUCT,
    ELSEWHERE,
    IN,
    OUT,
    GateSites,
    Site,
)
from taylor_kernels.statistics.layers import Layers, channel_dim, filter_count
from taylor_kernels.tracing import Channels
from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.steps import END, NORM, Step

#: A place: the number of a node of the graph of norms and layers, and which side of it.
_Place = tuple[int, str]


def find_gate_sites(
    channels: Channels, model: nn.Module, layers: Layers, *, gradients: bool = False
) -> GateSites:
    """The sites of the gates of all filters of some layers.

    Args:
        channels: a trace of the model.
        layers: name -> module, some of the model's.
        gradients: slopes over the minibatch will do, which are read off gradients of weights.
    """
    experts = channels.expert_weights
    nodes = _nodes(channels.steps, channels.input_dims if gradients else {})
    wanted = np.unique(
        np.concatenate(
            [channels.layers[n][1].numpy() for n in layers if n in channels.layers]
            or [np.zeros(0, np.int64)]
        )
    )
    members: dict[_Place, list[Vector]] = defaultdict(list)
    unseen: set[str] = set()
    # A router's outputs are no channels of what an expert adds.
    in_steps = np.setdiff1d(wanted, np.concatenate([wanted[:0], *(e.classes for e in experts)]))
    for classes, taking, giving, passing in _kinds(nodes, in_steps):
        places, out_of_reach = _sites(nodes, taking, giving, passing)
        unseen.update(
            nodes[n].weight if nodes[n].weight in channels.bare else nodes[n].layer
            for n in out_of_reach
        )
        if any(nodes[n].kind == NORM for n in out_of_reach):
            continue  # nor are the layers before it seen
        for place in places:
            members[place].append(classes)
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    found = []
    for (number, side), groups in members.items():
        node = nodes[number]
        every = node.inputs if side == IN else node.outputs
        stands = np.isin(every, np.concatenate(groups))
        placed = torch.from_numpy(np.where(stands, every, ELSEWHERE))
        how, dim = node.reach(side)
        behind = tuple(sorted(_layers_before(nodes, number, side)))
        weight = "" if how == AT_MODULE else node.weight
        site = Site(node.module, side, dim, placed, behind, weight, how)
        found.append((node.rank(nodes, order), side, site))
    for one in experts if gradients else ():
        rank = (order[one.module],) * 2
        stands = np.isin(one.classes, wanted)
        placed = torch.from_numpy(np.where(stands, one.classes, ELSEWHERE))
        for weight in one.last if stands.any() else ():
            dims = model.get_parameter(weight).dim()
            site = Site(one.module, OUT, -dims, placed, (one.module,), weight, AT_GRADIENT)
            found.append((rank, OUT, site))
    sites = [site for _, _, site in sorted(found, key=lambda item: item[:2])]
    of_layers = {}
    next_class = 1 + max((int(s.classes.max()) for s in sites), default=0)
    next_class = max(next_class, 1 + int(wanted.max(initial=0)))
    for name, layer in layers.items():
        followed = name in channels.layers and channels.layers[name][1].numel() > 0
        if followed and name not in unseen:
            of_layers[name] = channels.layers[name][1]
            continue
        of_layers[name] = torch.arange(next_class, next_class + filter_count(layer))
        next_class += filter_count(layer)
        if not followed and name not in unseen and name not in channels.outside:
            # It did not run in the trace, or its weight is computed in a way that could not be
            # followed: nothing is known but that it has an output.
            sites.append(Site(name, OUT, channel_dim(layer), of_layers[name], (name,)))
    return GateSites(tuple(sites), of_layers)


def _layers_before(nodes: Sequence[_Node], number: int, side: str) -> set[str]:
    """The layers that make what comes to a place; what is made goes through norms alone."""
    found: set[str] = set()
    seen: set[int] = set()
    waiting = [number] if side == OUT else [*nodes[number].sources]
    while waiting:
        node = nodes[one := waiting.pop()]
        if one in seen:
            continue
        seen.add(one)
        if node.kind == NORM:
            waiting += node.sources
        elif node.layer:
            found.add(node.layer)
    return found


class _Node:
    """All runs of a module as one norm or layer, or one run that hooks cannot reach."""

    def __init__(self, step: Step) -> None:
        self.kind, self.module, self.layer = step.kind, step.module, step.layer
        self.weight, self.linear = step.weight, step.linear
        self.inputs, self.outputs = step.inputs, step.outputs
        self.passing = step.outputs[:0]
        if self.kind == END:
            self.passing, self.outputs = self.outputs, self.passing
        self.dims = {IN: step.input_dim, OUT: step.output_dim}
        self.input_dim: int | None = None  # of its weight, whose gradient is read
        self.sources: set[int] = set()
        self.through = step.depthwise and _same(step)

    def reach(self, side: str) -> tuple[str, int]:
        """How a side can be met, "" if it cannot, and the channels' dimension from the end."""
        dim = self.dims[side]
        if dim is not None:
            return AT_MODULE, dim
        if self.linear:
            return AT_PRODUCT, -1
        if side == IN and self.input_dim is not None:
            return AT_GRADIENT, self.input_dim
        return "", 0

    def met(self, side: str) -> bool:
        """Whether a side can be met while the model runs, with the examples apart."""
        return self.reach(side)[0] in (AT_MODULE, AT_PRODUCT)

    def rank(self, nodes: Sequence[_Node], order: Mapping[str, int]) -> tuple[int, int]:
        """Where its rows come in sums: those of a norm where the layer is that it is handed."""
        own = order.get(self.module, -1)
        made = [order.get(nodes[n].module, -1) for n in self.sources if nodes[n].kind != NORM]
        return (min(made) if self.kind == NORM and made else own, own)


def _same(step: Step) -> bool:
    """Whether each channel that comes in goes together with those that are made of it."""
    if not step.inputs.size or step.outputs.size % step.inputs.size:
        return False
    return bool((step.outputs.reshape(step.inputs.size, -1) == step.inputs[:, None]).all())


def _nodes(steps: Sequence[Step], input_dims: Mapping[str, int]) -> list[_Node]:
    """The graph's nodes.

    Args:
        input_dims: weight whose gradient is read -> the dimension of its inputs, from the end.
    """
    nodes: list[_Node] = []
    number: list[int] = []
    known: dict[tuple[str, str, str], int] = {}
    of_modules: dict[tuple[str, str], list[_Node]] = defaultdict(list)
    for step in steps:
        key = (step.module, step.kind, step.weight)
        first = nodes[known[key]] if key in known else None
        if (
            first is not None
            and step.kind != END
            and {IN: step.input_dim, OUT: step.output_dim} == first.dims
            and np.array_equal(step.inputs, first.inputs)
            and np.array_equal(step.outputs, first.outputs)
        ):
            first.linear &= step.linear
            number.append(known[key])
            continue
        known.setdefault(key, len(nodes))
        number.append(len(nodes))
        nodes.append(_Node(step))
        of_modules[key[:2]].append(nodes[-1])
    for alike in of_modules.values():
        for node in alike if len(alike) > 1 else ():
            # Other channels, or out of reach in one of its runs: no hook can tell them apart.
            node.dims = {IN: None, OUT: None}
    uses = Counter(node.weight for node in nodes)
    for node in nodes:
        if uses[node.weight] > 1:  # nor the uses of one weight
            node.linear = False
        else:
            node.input_dim = input_dims.get(node.weight)
    for step, own in zip(steps, number, strict=True):
        nodes[own].sources.update(number[source] for source in step.sources)
    return nodes


def _kinds(
    nodes: Sequence[_Node], wanted: Vector
) -> Iterable[tuple[Vector, frozenset[int], frozenset[int], frozenset[int]]]:
    """Classes that run through the same nodes: the classes, what takes them, what gives them and
    what passes them on."""
    sides = [side for node in nodes for side in (node.inputs, node.outputs, node.passing)]
    # A pair of a class and a side is one number.
    pairs = np.unique(
        np.concatenate([wanted[:0], *(s * len(sides) + i for i, s in enumerate(sides))])
    )
    of_classes, at_sides = np.divmod(pairs, max(len(sides), 1))
    stay = np.isin(of_classes, wanted)
    at_sides = at_sides[stay]
    classes, first, counts = np.unique(of_classes[stay], return_index=True, return_counts=True)
    if not classes.size:
        return
    # Sums of random numbers tell sets of sides apart.
    draw = np.random.default_rng(0).integers(1, 2**62, (len(sides), 2))
    sums = np.add.reduceat(draw[at_sides], first)
    _, one, kind = np.unique(sums, axis=0, return_index=True, return_inverse=True)
    for number, example in enumerate(one):
        start = first[example]
        runs = at_sides[start : start + counts[example]]
        taking, giving, passing = (frozenset((runs[runs % 3 == i] // 3).tolist()) for i in range(3))
        yield classes[kind.ravel() == number], taking, giving, passing


def _sites(
    nodes: Sequence[_Node],
    taking: Collection[int],
    giving: Collection[int],
    passing: Collection[int],
) -> tuple[set[_Place], set[int]]:
    """The sites of channels that run through these nodes; and nodes on a path without a site."""
    made_by = {n: nodes[n].sources & set(giving) for n in taking}
    undone: set[int] = set()  # what is made there goes on to a norm, or through an attention
    while True:
        on_the_way = [
            n
            for n in taking
            if nodes[n].kind == NORM or n in passing or (nodes[n].through and n in undone)
        ]
        found = undone.union(*(made_by[n] for n in on_the_way))
        if found == undone:
            break
        undone = found
    readers = [n for n in taking if n not in on_the_way]
    stands = {n for n in giving if n not in undone and nodes[n].met(OUT)}
    at_inputs: set[int] = set()
    while True:
        mixed = [n for n in readers if n not in at_inputs and not made_by[n] <= stands]
        if not mixed:
            break
        at_inputs.update(mixed)
        stands -= set().union(*(made_by[n] for n in mixed))
    places: set[_Place] = {(n, OUT) for n in stands}
    out_of_reach: set[int] = set()
    for n in at_inputs:
        if nodes[n].met(IN):
            places.add((n, IN))
            continue
        seen = {m for m in made_by[n] if nodes[m].met(OUT)}
        if not made_by[n] <= seen and nodes[n].reach(IN)[0]:
            places.add((n, IN))
            continue
        places |= {(m, OUT) for m in seen}
        out_of_reach |= made_by[n] - seen
    return places, out_of_reach

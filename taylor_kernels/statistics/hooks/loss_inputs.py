"""The tensors through which a loss depends on a model, and the loss as a function of these.

They are what the model returned and the loss read. Where a loss goes past that, as one that the
model computes itself does, or is linear in it, they are the outputs of the layers, or the gates,
that come last on the way to the loss. The model itself is never differentiated twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map

from taylor_kernels.hooks import remove_all
from taylor_kernels.statistics.base import version_of
from taylor_kernels.statistics.hessian_product import (
    check_graph,
    second_derivatives,
    slopes_with_graph,
)
from taylor_kernels.statistics.hooks.passes import inside_backward
from taylor_kernels.statistics.layers import is_layer

_OF_LOSS = "closure: its loss cannot be differentiated twice: {}; use obd_fisher or taylor_fo_bn"


class Place(NamedTuple):
    """A tensor of the graph where it was met: operations in place may move it on later."""

    tensor: Tensor
    edge: GradientEdge
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        return cls(tensor, get_gradient_edge(tensor), version_of(tensor))

    @property
    def changed(self) -> bool:
        return version_of(self.tensor) != self.version

    @property
    def key(self) -> tuple[Any, int]:
        return self.edge.node, self.edge.output_nr


class LossFunction:
    """A loss as a function of tensors z, with everything else held.

    Attributes:
        values: z as it is, without a graph; None where code has overwritten it.
        slopes: ∂L/∂z.
        examples: the size of dim 0, if all of z have the same, else None.
    """

    def __init__(self, loss: Tensor, places: Sequence[Place], returned: Sequence[Place]) -> None:
        own = {place.key for place in returned}
        self._nodes = [place.edge.node for place in places if place.key not in own]
        edges = [place.edge for place in places]
        with self._held():
            found = slopes_with_graph(loss, edges)
        read = [i for i, slope in enumerate(found) if slope is not None]
        self._graphs = [slope for slope in found if slope is not None]
        self._edges = [edges[i] for i in read]
        self.places = [places[i] for i in read]
        self.slopes = [slope.detach() for slope in self._graphs]
        self.values = [None if p.changed else p.tensor.detach() for p in self.places]
        sizes = {slope.shape[:1] for slope in self.slopes}
        self.examples = next(iter(sizes))[0] if len(sizes) == 1 and () not in sizes else None
        self._looks: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        check_graph(self._graphs, _OF_LOSS, {edge.node for edge in self._edges})

    @property
    def roots(self) -> Sequence[Any]:
        """Tensors or edges where backward passes through the model begin."""
        return [p.edge if p.changed else p.tensor for p in self.places]

    @property
    def dtype(self) -> torch.dtype:
        """What its curvature is computed in: float32 at least."""
        dtype = torch.float32
        for slope in self.slopes:
            dtype = torch.promote_types(dtype, slope.dtype)
        return dtype

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """(∂²L/∂z²)·vectors, like the slopes.

        Raises:
            RuntimeError: an operation of the loss cannot be differentiated twice.
        """
        bent = [
            (slope, v.reshape(slope.shape).to(slope))
            for slope, v in zip(self._graphs, vectors, strict=True)
            if slope.requires_grad
        ]
        if not bent:
            return [torch.zeros_like(slope) for slope in self.slopes]
        slopes, given = zip(*bent, strict=True)
        with second_derivatives(_OF_LOSS), self._held():
            found = torch.autograd.grad(
                slopes, self._edges, given, retain_graph=True, allow_unused=True
            )
        return [
            torch.zeros_like(slope) if part is None else part.detach()
            for slope, part in zip(self.slopes, found, strict=True)
        ]

    @cached_property
    def bends(self) -> bool:
        """Whether it has a curvature, or nothing that could have one."""
        if not any(slope.any() for slope in self.slopes):
            return True
        if any(part.any() for part in self.look(-1)[1]):
            return True
        vectors = [generic(slope, number) for number, slope in enumerate(self.slopes)]
        return any(part.any() for part in self.product(vectors))

    def look(self, dim: int) -> tuple[list[Tensor], list[Tensor]]:
        """Vectors, and H times them: 0 where z is greatest along `dim`, generic elsewhere.

        Softmax of z has its mass there, and a product with what is 0 there cancels nowhere.
        """
        if dim not in self._looks:
            vectors = []
            for number, (value, slope) in enumerate(zip(self.values, self.slopes, strict=True)):
                vector = generic(slope.float(), number)
                if value is not None and value.dim() > max(dim, 0):
                    vector = vector.scatter(dim, value.argmax(dim, keepdim=True), 0.0)
                vectors.append(vector)
            self._looks[dim] = vectors, self.product(vectors)
        return self._looks[dim]

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Inside, nothing flows from one of z back to another through the model."""
        handles = [node.register_prehook(_nothing) for node in self._nodes]
        try:
            yield
        finally:
            remove_all(handles)


def generic(like: Tensor, number: int) -> Tensor:
    """Numbers from ½ to 1½, other ones for each tensor: only a matrix of 0 takes them to 0."""
    golden = 0.6180339887498949
    numbers = (torch.arange(like.numel(), device=like.device) + 7919 * number) % 16381
    return (numbers * golden).frac().add(0.5).to(like.dtype).view(like.shape)


def _nothing(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if grad is None else torch.zeros_like(grad) for grad in gradients)


class LossInputs:
    """Notes, while a closure runs, where its loss can be cut off from the model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._returned: list[Place] = []
        self._originals: list[Place] = []  # of which those are copies
        self._layers: list[Place] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, calls of the model are seen."""
        layers = [module for module in self._model.modules() if is_layer(module)]
        handles = [layer.register_forward_hook(self._on_layer) for layer in layers]
        handles.append(self._model.register_forward_hook(self._on_model))
        try:
            yield
        finally:
            remove_all(handles)

    def forget(self) -> None:
        self._returned, self._originals, self._layers = [], [], []

    def function(self, loss: Tensor, gates: Sequence[Place]) -> LossFunction:
        """The loss as a function of what it reads of the model.

        Args:
            gates: of these none must be left in what is taken for the loss.

        Raises:
            ValueError: it does not depend on the model, or on what is empty.
            RuntimeError: an operation of the loss cannot be differentiated twice.
        """
        inside = [*self._layers, *gates]
        read = _reached(loss, [*self._returned, *self._originals, *inside])
        full = [place for place in read if place.tensor.numel()]
        if read and not full:
            raise ValueError("closure: what the model returned is empty; leave out empty batches")
        found = LossFunction(loss, full, self._returned) if full else None
        if found is None or not found.places:
            raise ValueError(
                "closure: its loss does not depend on what the model returned; compute it from "
                "that, or use taylor_so_bn, which takes any loss"
            )
        if found.bends:
            return found
        deeper = _reached(loss, inside)
        if deeper and {place.key for place in deeper} != {place.key for place in read}:
            other = LossFunction(loss, deeper, [])
            if other.places and other.bends:
                return other
        return found

    def _on_layer(self, _: nn.Module, __: tuple, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad and not inside_backward():
            self._layers.append(Place.of(output))

    def _on_model(self, _: nn.Module, __: tuple, output: Any) -> Any:
        return tree_map(self._apart, output)

    def _apart(self, part: Any) -> Any:
        """A tensor with the same values, of which the model's output is an input of the graph.

        The output of the last layer has hooks of its own, which must not see the gradients that
        are sent back from here. Half types are widened, so that the loss's curvature is not
        rounded.
        """
        if isinstance(part, Tensor):
            half = part.dtype in (torch.float16, torch.bfloat16)
            own = part.float() if half else part.view_as(part)
            if part.requires_grad and part.dim():
                self._originals.append(Place.of(part))
                self._returned.append(Place.of(own))
            return own
        if not dataclasses.is_dataclass(part) or isinstance(part, type):
            return part
        fields = [field.name for field in dataclasses.fields(part) if field.init]
        own_fields = {f: tree_map(self._apart, getattr(part, f)) for f in fields}
        return dataclasses.replace(part, **own_fields)


def _reached(loss: Tensor, places: Sequence[Place]) -> list[Place]:
    """Those that come first on the ways back from the loss, in the order of `places`."""
    known = {place.key: place for place in places}
    met, seen = set(), set()
    stack = [(loss.grad_fn, loss.output_nr)]
    while stack:
        node, number = stack.pop()
        if node is None or (node, number) in seen:
            continue
        seen.add((node, number))
        if (node, number) in known:
            met.add((node, number))
        else:
            stack.extend(node.next_functions)
    return [place for key, place in known.items() if key in met]

"""Statistics that run the closure: one forward pass, and backward passes of their own."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from taylor_kernels.statistics.activation_gradients import scoring
from taylor_kernels.statistics.base import Closure
from taylor_kernels.statistics.hooks.loss_inputs import LossFunction, LossInputs, Place
from taylor_kernels.statistics.hooks.passes import WatchesPasses, inside_backward


@contextmanager
def differentiating() -> Iterator[None]:
    """Inside, graphs are recorded, whatever mode the caller is in, and a closure is run.

    Raises:
        ValueError: the closure's loss has no graph any more.
    """
    thread = threading.get_ident()
    WatchesPasses.in_closure.append(thread)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise ValueError(
            "closure: a backward pass in it has freed the graph of its loss; return the loss of "
            "loss_fn(model(x), y) alone, without backward() and zero_grad()"
        ) from error
    finally:
        WatchesPasses.in_closure.remove(thread)


def run_closure(closure: Closure) -> Tensor:
    """The closure's loss with its graph; to be called inside `differentiating`.

    Raises:
        TypeError, ValueError: it returned no scalar, or one that depends on nothing.
    """
    loss = closure()
    if not isinstance(loss, Tensor):
        raise TypeError(f"closure: expected it to return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"closure: returned a tensor of shape {tuple(loss.shape)}; return the loss as a "
            "scalar, such as its mean over the examples"
        )
    if not loss.requires_grad:
        raise ValueError(
            "closure: its loss does not depend on the model; return the tensor that loss_fn(model("
            "x), y) gives, not detached and not computed under torch.no_grad()"
        )
    return loss.reshape(())


class InClosure(WatchesPasses):
    """Watches the passes of the closure, and no others.

    Parameters require no gradient there, as inside scoring(): what flows back is ∂/∂activations,
    and it is taken by torch.autograd.grad, which leaves every `.grad` alone.
    """

    power = 0

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._watching = False

    def _tables(self, closure: Closure | None) -> list[Tensor]:
        assert closure is not None
        self._watching = True
        try:
            # The backward passes run inside too, since a checkpoint calls the model again there.
            with differentiating(), scoring(self.model):
                tables = self._tables_of(closure)
            self._check()
            return tables
        finally:
            self._watching = False

    def _watches(self) -> bool:
        return torch.is_grad_enabled() and self._watching

    @abstractmethod
    def _tables_of(self, closure: Closure) -> list[Tensor]:
        """Run the closure, and make of it what collect() hands over."""


class FromOutput(InClosure):
    """Lets vectors of its own choice flow back from what the loss read to the layers' outputs."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._inputs = LossInputs(self.model)
        self._places: list[Place] = []
        self._flowing = False

    def _tables_of(self, closure: Closure) -> list[Tensor]:
        try:
            with self._inputs.noted():
                loss = run_closure(closure)
            return self._tables_at(self._inputs.function(loss, self._places))
        finally:
            self._places.clear()
            self._inputs.forget()

    @abstractmethod
    def _tables_at(self, loss: LossFunction) -> list[Tensor]:
        """What collect() hands over, from the loss as a function of what it read of the model."""

    def _backward(self, loss: LossFunction, vectors: Sequence[Tensor]) -> None:
        """Let `vectors` flow back from what the loss read to all outputs that are watched."""
        if not self._places:
            raise RuntimeError("closure: it called none of the layers that are to be scored")
        edges = [place.edge for place in self._places]
        given = [v.view_as(slope).to(slope) for v, slope in zip(vectors, loss.slopes, strict=True)]
        self._flowing = True
        try:
            torch.autograd.grad(loss.roots, edges, given, retain_graph=True, allow_unused=True)
        finally:
            self._flowing = False

    def _takes_gradients(self) -> bool:
        return self._flowing  # and not those that a closure takes, for a penalty on them, say

    def _awaits_gradient(self, name: str, output: Tensor) -> bool:
        awaits = super()._awaits_gradient(name, output)
        if awaits and not inside_backward():
            # Not the tensor: an operation in place would move it to another place in the graph.
            self._places.append(Place.of(output))
        return awaits


def check_examples(name: str, examples: int, batch: int) -> None:
    """A layer was given as many examples as the model returned.

    Raises:
        RuntimeError: it was not, so its gradients are not those of an example.
    """
    if examples != batch:
        raise RuntimeError(
            f"{name}: was given {examples} examples (dim 0) where the model returned {batch}, and "
            "this criterion squares the gradients of one example; leave it out (layers= of "
            "Importance, ignore= of Pruner), or use taylor_so_diag"
        )

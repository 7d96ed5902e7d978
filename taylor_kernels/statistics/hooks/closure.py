"""Statistics that run the closure: one forward pass, and backward passes of their own."""

from __future__ import annotations

import dataclasses
import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from taylor_kernels._scoring import scoring
from taylor_kernels.statistics.base import Closure
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

    def _generator(self) -> torch.Generator:
        """Seeded by the number of this update, so that a resumed meter draws the same numbers."""
        return torch.Generator().manual_seed(self.updates)


class FromOutput(InClosure):
    """Lets gradients of its own choice flow back from the model's output to the layers' outputs."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._edges: list[torch.autograd.graph.GradientEdge] = []
        self._flowing = False

    def _tables_of(self, closure: Closure) -> list[Tensor]:
        try:
            with outputs_of(self.model) as outputs:
                loss = run_closure(closure)
            return self._tables_at(loss, only_output(outputs))
        finally:
            self._edges.clear()

    @abstractmethod
    def _tables_at(self, loss: Tensor, output: Tensor) -> list[Tensor]:
        """What collect() hands over, from the loss and the model's output it was computed from."""

    def _backward(
        self, tensor: Tensor, gradient: Tensor | None = None, *, keep: bool = True
    ) -> None:
        """Let `gradient` flow back from `tensor` to the outputs of all layers that are watched."""
        if not self._edges:
            raise RuntimeError("closure: it called none of the layers that are to be scored")
        self._flowing = True
        try:
            torch.autograd.grad(tensor, self._edges, gradient, retain_graph=keep, allow_unused=True)
        finally:
            self._flowing = False

    def _takes_gradients(self) -> bool:
        return self._flowing  # and not those that a closure takes, for a penalty on them, say

    def _awaits_gradient(self, name: str, output: Tensor) -> bool:
        awaits = super()._awaits_gradient(name, output)
        if awaits and not inside_backward():
            # Not the tensor: an operation in place would move it to another place in the graph.
            self._edges.append(torch.autograd.graph.get_gradient_edge(output))
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
            "Importance, ignore= of Pruner), or use taylor_so_bn"
        )


@contextmanager
def outputs_of(model: nn.Module) -> Iterator[list[Any]]:
    """What the model returns, call by call."""
    outputs: list[Any] = []

    def keep(_: nn.Module, __: tuple, output: Any) -> Any:
        outputs.append(tree_map(_apart, output))
        return outputs[-1]

    handle = model.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def _apart(part: Any) -> Any:
    """A tensor with the same values, of which the model's output is an input of the graph.

    The output of the last layer has hooks of its own, which must not see the gradients that are
    sent back from here. Half types are widened, so that the loss's curvature is not rounded.
    """
    if isinstance(part, Tensor):
        half = part.dtype in (torch.float16, torch.bfloat16)
        return part.float() if half else part.view_as(part)
    if not _is_record(part):
        return part
    fields = [field.name for field in dataclasses.fields(part) if field.init]
    return dataclasses.replace(part, **{f: tree_map(_apart, getattr(part, f)) for f in fields})


def _is_record(part: object) -> bool:
    return dataclasses.is_dataclass(part) and not isinstance(part, type)


def only_output(outputs: Sequence[Any]) -> Tensor:
    """The tensor [N, ...] that the model returned, alone or in a container."""
    if len(outputs) != 1:
        raise ValueError(
            f"closure: called the model {len(outputs)} times, but this criterion takes the loss's "
            "curvature at one output; call it once, or use taylor_so_bn"
        )
    found = [
        leaf
        for part in tree_leaves(outputs[0])
        for leaf in tree_leaves(vars(part) if _is_record(part) else part)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim()
    ]
    full = [leaf for leaf in found if leaf.numel()]
    if found and not full:
        raise ValueError("closure: what the model returned is empty; leave out empty batches")
    found = full
    if len(found) != 1:
        raise ValueError(
            f"model: its output holds {len(found)} floating tensors, but this criterion takes the "
            "loss's curvature at one; wrap the model so that it returns that one, or use "
            "taylor_so_bn"
        )
    return found[0]

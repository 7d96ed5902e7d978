"""What criteria are compared on: a network as it is, its filters, minibatches and a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.statistics.activation_gradients import scoring
from taylor_kernels.statistics.layers import Layers, filter_count, find_layers
from taylor_kernels.statistics.loss_change import Filter
from taylor_kernels.tracing.run.running import call, example_count, tensors_in

Batch = tuple[Any, Any]
LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Problem:
    """A network in eval mode, and the data that its filters are judged by.

    Attributes:
        layers: the layers whose filters are compared.
        batches: minibatches (inputs, targets) that the criteria see, one at a time.
        oracle_batches: the same or more data for the oracle, in batches of any size.
        test_batches: what the pruning curves are measured on.
        loss: of (outputs, targets), a mean over the examples.
        classifies: the outputs are logits [N, C, ...] and the targets classes [N, ...].
        origin: what tells this from another problem where weights, data and source files do not.
    """

    name: str
    model: nn.Module
    layers: tuple[str, ...]
    batches: Sequence[Batch]
    oracle_batches: Sequence[Batch]
    test_batches: Sequence[Batch]
    loss: LossFunction
    classifies: bool
    origin: str = ""

    @property
    def filters(self) -> list[Filter]:
        """All filters of `layers`, in order; scores are arrays in this order."""
        return [(name, c) for name, n in self.widths.items() for c in range(n)]

    @property
    def widths(self) -> dict[str, int]:
        """Layer -> filters."""
        return {name: filter_count(layer) for name, layer in self.scored.items()}

    @property
    def scored(self) -> Layers:
        return find_layers(self.model, self.layers, trainable_only=False)

    def loss_of(self, batch: Batch) -> Tensor:
        return self.loss(call(self.model, batch[0]), batch[1])

    def mean_loss(self) -> float:
        """The mean loss over `oracle_batches`: what the oracle's changes are changes of."""
        found = loss_and_accuracy(self.model, self.oracle_batches, self.loss, classifies=False)
        return found["loss"]

    def test_figures(self, model: nn.Module | None = None) -> dict[str, float]:
        """Loss, and accuracy of a classifier, on `test_batches`."""
        return loss_and_accuracy(
            model or self.model, self.test_batches, self.loss, classifies=self.classifies
        )

    def shortened(self, minibatches: int) -> Problem:
        """The same on so many minibatches, and about as many examples for the oracle."""
        batches = self.batches[:minibatches]
        wanted = sum(example_count(targets) for _, targets in batches)
        kept: list[Batch] = []
        while wanted > 0 and len(kept) < len(self.oracle_batches):
            kept.append(self.oracle_batches[len(kept)])
            wanted -= example_count(kept[-1][1])
        return replace(self, batches=batches, oracle_batches=kept)

    def facts(self) -> dict[str, int]:
        """How much data there is."""
        return {
            "minibatches": len(self.batches),
            "minibatch": example_count(self.batches[0][1]),
            "oracle_examples": sum(example_count(targets) for _, targets in self.oracle_batches),
            "test_examples": sum(example_count(targets) for _, targets in self.test_batches),
        }


@torch.no_grad()
def loss_and_accuracy(
    model: nn.Module, batches: Sequence[Batch], loss: LossFunction, *, classifies: bool
) -> dict[str, float]:
    """Mean loss over the examples of `batches`, and the fraction of right answers."""
    loss_sum = hits = examples = answers = 0.0
    for inputs, targets in batches:
        outputs = call(model, inputs)
        n = example_count(targets)
        loss_sum += n * float(loss(outputs, targets))
        examples += n
        if classifies:
            hits += int((outputs.argmax(1) == targets).sum())
            answers += targets.numel()
    result = {"loss": loss_sum / examples}
    return result | {"accuracy": hits / answers} if classifies else result


def inner_layers(model: nn.Module, inputs: Any) -> tuple[tuple[str, ...], dict[str, str]]:
    """The layers whose filters can go, and layer -> why not for the others.

    The last layers before the outputs stay: their filters are the answers themselves.
    """
    layers = find_layers(model, None, trainable_only=False)
    made: dict[str, set[Any]] = {name: set() for name in layers}
    handles = []
    kept: list[Any] = []  # a node that is freed could lend its identity to another
    for name, layer in layers.items():

        def note(_: nn.Module, __: tuple, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor) and output.grad_fn is not None:
                made[name].add(output.grad_fn)
                kept.append(output)

        handles.append(layer.register_forward_hook(note))
    try:
        with scoring(model), torch.enable_grad():
            outputs = call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    last = _first_reached([t.grad_fn for t in tensors_in(outputs)], set().union(*made.values()))
    why = {}
    for name, nodes in made.items():
        if not nodes:
            why[name] = "it was not called, or returned no tensor"
        elif nodes & last:
            why[name] = "its filters are the model's outputs"
    return tuple(name for name in layers if name not in why), why


def _first_reached(nodes: Sequence[Any], marked: set[Any]) -> set[Any]:
    """The marked nodes that backward() meets before any other marked one, on any path."""
    found: set[Any] = set()
    seen: set[Any] = set()
    todo = [node for node in nodes if node is not None]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in marked:
            found.add(node)
        else:
            todo += [after for after, _ in node.next_functions if after is not None]
    return found

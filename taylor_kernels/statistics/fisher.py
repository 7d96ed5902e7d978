"""The diagonal of the Fisher matrix, from per-example weight gradients that are never stored.

A layer's input x is met in its forward pass, the gradient dy of its output in the backward pass;
as soon as both are there they are reduced to a number per filter, and let go.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from taylor_kernels.hooks import Hook
from taylor_kernels.shards import whole
from taylor_kernels.statistics.base import Closure, version_of
from taylor_kernels.statistics.counting import counting
from taylor_kernels.statistics.hooks.closure import FromOutput, check_examples
from taylor_kernels.statistics.hooks.loss_inputs import LossFunction
from taylor_kernels.statistics.hooks.passes import (
    NOTHING_SEEN,
    WatchesPasses,
    graph_is_kept,
    inside_backward,
)
from taylor_kernels.statistics.layer_fisher import Use, example_count, layer_fisher
from taylor_kernels.statistics.layers import (
    Layer,
    check_output,
    filter_count,
    held_weight,
    used_weight,
)
from taylor_kernels.statistics.output_curvature import sampled_columns, warn_if_linear
from taylor_kernels.statistics.registry import register_statistic


class _Input:
    """The input of one use of a layer, waiting for the gradient of its output."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self._name = name
        self._tensor: Tensor | None = tensor.detach()
        self._version = version_of(tensor)
        self.dy: Tensor | None = None
        self.freed = False  # no further gradient can come

    def add(self, dy: Tensor) -> None:
        """Gradients of several backward passes over a graph that is kept add up."""
        if self._tensor is None:
            raise RuntimeError(f"{self._name}: backward() ran twice over a graph it had freed")
        self.dy = dy.detach() if self.dy is None else self.dy + dy.detach()
        self.freed = not graph_is_kept()

    def take(self) -> Use:
        """The input and its gradient so far."""
        assert self._tensor is not None
        assert self.dy is not None
        tensor, dy, self.dy = self._tensor, self.dy, None
        if self.freed:
            self._tensor = None
        if version_of(tensor) != self._version:
            raise RuntimeError(
                f"{self._name}: its input was changed in place between the forward and the "
                "backward pass, and its values are gone; do that out of place (without "
                "inplace=True)"
            )
        return tensor, dy


class _Pass:
    """The uses of a layer in one pass of the model."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.calls = 0
        self.inputs: list[_Input] = []  # those that have a gradient

    @property
    def complete(self) -> bool:
        return sum(x.freed for x in self.inputs) >= self.calls

    def discard(self) -> None:
        for x in self.inputs:
            x.dy = None
        self.inputs = []


class _Fishers(WatchesPasses):
    """What the statistics of Fisher diagonals share: the inputs and output gradients of all uses.

    A layer that was called once in the pass is reduced when its gradient arrives. If it was called
    several times, the gradients of an example add up before they are squared, so the layer waits
    until all of them are there. The same holds for several backward passes over one graph.
    """

    power = 2

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._passes: dict[str, _Pass] = {}  # the last of each layer
        self._waiting: dict[_Pass, str] = {}
        # Of each layer the sums over the examples of a use, with its pass and their number.
        self._sums: dict[str, list[tuple[int, Tensor, int]]] = {}
        self._handles += [
            layer.register_forward_hook(Hook(self._on_layer, name), with_kwargs=True)
            for name, layer in self.layers.items()
        ]

    def _on_layer(
        self, name: str, layer: Layer, args: tuple, kwargs: dict[str, Any], output: object
    ) -> None:
        output = check_output(name, output)
        self._on_call()
        here = self._passes.get(name)
        if here is None or here.number != self._pass:
            here = self._passes[name] = _Pass(self._pass)
        # What a checkpoint runs again in backward() was counted the first time.
        here.calls += not inside_backward()
        if not self._awaits_gradient(name, output):
            return
        x = _Input(name, args[0] if args else kwargs["input"])

        def on_gradient(dy: Tensor) -> None:
            if not self._takes_gradients():
                return
            self._in_backward = True
            if x.dy is None:
                here.inputs.append(x)
            x.add(dy)
            if here.complete:
                self._waiting.pop(here, None)
                self._reduce(name, here)
            else:
                self._waiting[here] = name

        output.register_hook(on_gradient)

    @torch.no_grad()
    def _reduce(self, name: str, here: _Pass) -> None:
        """Σ_k w_k² Σ_n g_nk² of a layer over what there is of a pass."""
        layer = self.layers[name]
        try:
            uses = [x.take() for x in here.inputs]
        except RuntimeError:
            self.discard()
            raise
        here.inputs = []
        by_count: dict[int, list[Use]] = {}
        for use in uses:
            by_count.setdefault(example_count(layer, use[0]), []).append(use)
        for n, alike in by_count.items():
            try:
                fisher = layer_fisher(layer, alike, whole(used_weight(layer)), self.backend)
            except ValueError as error:
                self.discard()
                raise RuntimeError(
                    f"{name}: its output is not that of a {_kind(layer)} of its input ({error}), "
                    "as where a subclass pads in its own forward(); leave it out (layers= of "
                    "Importance, ignore= of Pruner), or use taylor_fo_bn or taylor_so_diag"
                ) from error
            self._add(name, here.number, fisher, n)

    def _add(self, name: str, number: int, fisher: Tensor, examples: int) -> None:
        self._sums.setdefault(name, []).append((number, fisher, examples))

    def _means(self) -> list[Tensor]:
        """[F, 1] per layer, over all examples that count."""
        self._reduce_waiting()
        masks = counting(self, (number for sums in self._sums.values() for number, *_ in sums))
        counts, means = [], []
        for name, layer in self.layers.items():
            total = torch.zeros(
                filter_count(layer), device=held_weight(layer).device, dtype=torch.float32
            )
            count = 0
            for use, (number, fisher, n) in enumerate(self._sums.get(name, ())):
                factor, more = self._share(n if masks is None else masks.count(name, number, n))
                total = total + fisher * factor if use else fisher * factor
                count += more
            counts += [count] if name in self._sums else []
            means.append((total / max(count, 1))[:, None])
        self.examples = max(counts, default=1)
        return means

    def _share(self, examples: int) -> tuple[int, int]:
        """What the sum over so many examples is multiplied by, and how many they count for."""
        # dy carries 1/N of a mean over N examples: N² makes it that of each one's own loss.
        return examples**2, examples

    def _reduce_waiting(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for here, name in waiting.items():
            self._reduce(name, here)

    def discard(self) -> None:
        super().discard()
        for here in self._waiting:
            here.discard()
        self._waiting, self._sums = {}, {}


@register_statistic
class Fisher(_Fishers):
    """[F, 1] per layer: Σ_k w_k² · mean over examples of (gradient of the example's own loss)².

    The loss is taken for a mean over the examples of its pass (dim 0 of a layer's input), so over
    passes of N_i examples: Σ_i N_i² Σ_n g_n² / Σ_i N_i. No weight gradient is read. Of a weight
    that two modules share each has its own use; a module that is called twice has one gradient
    per example, the sum over its calls.
    """

    name = "fisher"
    columns = "1: Σ w² · mean over examples of g², each of its own loss"
    reads = "activations"
    across_ranks = "mean"

    def _tables(self, closure: Closure | None) -> list[Tensor]:
        self._check()
        tables = self._means()
        if not self._sums:
            raise RuntimeError(NOTHING_SEEN)
        return tables


@register_statistic
class FisherProbe(FromOutput, _Fishers):
    """[F, 1] per layer: Σ_k w_k² h_k with E[h] the Gauss-Newton diagonal, from one random probe.

    For softmax and cross entropy that is the Fisher matrix with labels drawn from the model, here
    without drawing: signs in place of labels have the same mean and far less variance.
    """

    name = "fisher_probe"
    columns = "1: the same, of a random square root of the loss's curvature at the output"
    reads = "closure"
    across_ranks = "sum"

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._batch = 0
        self._sign = 1

    def _tables_at(self, loss: LossFunction) -> list[Tensor]:
        warn_if_linear(loss, stacklevel=7)
        factor = sampled_columns(loss, 1, self.updates, leading=False)
        if not factor.apart or loss.examples is None:
            raise ValueError(
                "closure: its loss lets examples meet (dim 0 of the model's output), as a "
                "contrastive loss does, so that they have no weight gradients each; use "
                "taylor_so_diag, which adds them up, or taylor_so_bn"
            )
        self._batch = loss.examples
        for vectors, self._sign in factor.columns:
            self._backward(loss, vectors)
            self._reduce_waiting()
        return self._means()

    def _add(self, name: str, number: int, fisher: Tensor, examples: int) -> None:
        check_examples(name, examples, self._batch)
        super()._add(name, number, self._sign * fisher, examples)

    def _share(self, examples: int) -> tuple[int, int]:
        return 1, 0  # the columns carry what the loss weighs its examples by, and add up


def _kind(layer: Layer) -> str:
    """The class of PyTorch's own that it is."""
    return next(c for c in type(layer).__mro__ if c.__module__.startswith("torch.nn.")).__name__

"""Ways to Σ_k w_k² mean_n g²_{n,k} for every filter of a model, a whole step each.

g_n is the gradient of example n's own loss. Where a way differentiates the minibatch's mean loss,
which gives each example 1/N of that, its squares are N² too small, and their sum times N the mean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import taylor_kernels as tk

#: layer -> [filters]
Scores = dict[str, Tensor]


def layers_in(model: nn.Module) -> dict[str, nn.Module]:
    """What is scored: convolutions and linear layers by name."""
    kinds = (nn.Conv2d, nn.Linear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


class Step:
    """One step on a model of its own, so that no way runs into another's hooks."""

    family: ClassVar[str] = ""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = copy.deepcopy(model), x, y
        self.layers = layers_in(self.model)

    def before(self) -> None:
        """Untimed: what the last step left behind goes."""
        self.model.zero_grad(set_to_none=True)

    def run(self) -> Scores:
        raise NotImplementedError

    def filters(self, squares: Mapping[str, Tensor], factor: float) -> Scores:
        """Sums over each filter's weights of w² · squares · factor."""
        with torch.no_grad():
            return {
                name: (layer.weight.square() * squares[name]).flatten(1).sum(1).mul_(factor)
                for name, layer in self.layers.items()
            }


class Plain(Step):
    """Forward and backward of the minibatch, no scores: what the others are held against."""

    family = "plain"

    def run(self) -> Scores:
        cross_entropy(self.model(self.x), self.y).backward()
        return {}


class Ours(Step):
    """`tk.Importance`; inside `tk.scoring` no weight gradients are computed."""

    family = "taylor-kernels"

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, *, scoring: bool) -> None:
        super().__init__(model, x, y)
        self._scoring = scoring
        self._meter = tk.Importance(self.model, "obd_fisher")

    def before(self) -> None:
        super().before()
        self._meter.reset()

    def run(self) -> Scores:
        with tk.scoring(self.model) if self._scoring else nullcontext():
            cross_entropy(self.model(self.x), self.y).backward()
            self._meter.update()
        # Optimal Brain Damage scores half of it, as the second term of the loss's Taylor series.
        return {name: 2 * scores for name, scores in self._meter.compute().items()}


class ExampleByExample(Step):
    """A forward and a backward for each example. On a float64 model it is the reference."""

    family = "batch-1 loop"

    def run(self) -> Scores:
        squares = {name: torch.zeros_like(layer.weight) for name, layer in self.layers.items()}
        for x, y in zip(self.x.split(1), self.y.split(1), strict=True):
            self.model.zero_grad(set_to_none=True)
            cross_entropy(self.model(x), y).backward()
            for name, layer in self.layers.items():
                squares[name].addcmul_(layer.weight.grad, layer.weight.grad)
        return self.filters(squares, 1 / len(self.x))


class UnfoldHooks(Step):
    """Hooks that unfold each example's input and multiply; no weight gradients besides.

    The input requires a gradient instead of the weights, so that dy reaches every layer.
    """

    family = "unfold hooks"

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__(model, x, y)
        self.model.requires_grad_(False)
        self.x = x.detach().clone().requires_grad_()
        self._squares: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            layer.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        def forward(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            x = inputs[0].detach()
            output.register_hook(lambda dy: self._collect(name, layer, x, dy))

        return forward

    def _collect(self, name: str, layer: nn.Module, x: Tensor, dy: Tensor) -> None:
        if isinstance(layer, nn.Linear):  # of [N, features]: the square of dy xᵀ is a product too
            self._squares[name] = dy.square().T @ x.square()
            return
        squares = torch.zeros_like(layer.weight).flatten(1)
        geometry = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        for one, grad in zip(x.split(1), dy.flatten(2), strict=True):
            example = grad @ F.unfold(one, *geometry)[0].T
            squares.addcmul_(example, example)
        self._squares[name] = squares.view_as(layer.weight)

    def before(self) -> None:
        self.x.grad = None
        self._squares.clear()

    def run(self) -> Scores:
        cross_entropy(self.model(self.x), self.y).backward()
        return self.filters(self._squares, len(self.x))


class Functorch(Step):
    """torch.func.vmap over torch.func.grad; a chunk bounds how many gradients exist at a time."""

    family = "vmap"

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, *, chunk: int | None = None) -> None:
        super().__init__(model, x, y)
        self.model.requires_grad_(False)  # or the surrounding autograd would record it all too
        self._chunk = chunk or len(x)
        self._weights = {f"{name}.weight": layer.weight for name, layer in self.layers.items()}
        self._grads = torch.func.vmap(torch.func.grad(self._loss), in_dims=(None, 0, 0))

    def _loss(self, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(self.model, weights, (x[None],))
        return cross_entropy(output, y[None])

    def run(self) -> Scores:
        squares: dict[str, Tensor] = {}
        for x, y in zip(self.x.split(self._chunk), self.y.split(self._chunk), strict=True):
            for name, grad in self._grads(self._weights, x, y).items():
                key = name.removesuffix(".weight")
                squares[key] = squares.get(key, 0) + grad.square_().sum(0)
        return self.filters(squares, 1 / len(self.x))


class BackPack(Step):
    """BackPACK's SumGradSquared. A network that is no Sequential goes through its converter."""

    family = "backpack"

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__(model, x, y)
        from backpack import extend

        self.model = extend(self.model, use_converter=not isinstance(model, nn.Sequential))
        self.layers = layers_in(self.model)
        self._loss = extend(nn.CrossEntropyLoss())

    def before(self) -> None:
        super().before()
        for parameter in self.model.parameters():
            parameter.__dict__.pop("sum_grad_squared", None)

    def run(self) -> Scores:
        from backpack import backpack
        from backpack.extensions import SumGradSquared

        with backpack(SumGradSquared()):
            self._loss(self.model(self.x), self.y).backward()
        squares = {name: layer.weight.sum_grad_squared for name, layer in self.layers.items()}
        return self.filters(squares, len(self.x))


class Opacus(Step):
    """Opacus' GradSampleModule: every example's gradient, in train mode and without BatchNorm."""

    family = "opacus"

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__(model, x, y)
        from opacus import GradSampleModule

        self.model = GradSampleModule(self.model.train(), loss_reduction="mean")

    def run(self) -> Scores:
        cross_entropy(self.model(self.x), self.y).backward()
        # With loss_reduction="mean" they are gradients of each example's own loss.
        squares = {
            name: layer.weight.grad_sample.square().sum(0) for name, layer in self.layers.items()
        }
        return self.filters(squares, 1 / len(self.x))


class TorchPruning(Step):
    """The loop that Torch-Pruning documents for its GroupHessianImportance.

    Its 1.6.1 asks for a parameter's name where it stores by the parameter, so that the last
    example's gradient overwrites all others'; `mended` adds them up, as is meant.
    """

    family = "torch-pruning"

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, *, mended: bool = True) -> None:
        super().__init__(model, x, y)
        from torch_pruning.pruner.importance import GroupHessianImportance

        class Mended(GroupHessianImportance):
            def accumulate_grad(self, model: nn.Module) -> None:
                for parameter in model.parameters():
                    square = parameter.grad.square()
                    if parameter in self._accu_grad:
                        self._accu_grad[parameter] += square
                    else:
                        self._accu_grad[parameter] = square

        self._scorer = (Mended if mended else GroupHessianImportance)()

    def before(self) -> None:
        super().before()
        self._scorer.zero_grad()

    def run(self) -> Scores:
        losses = cross_entropy(self.model(self.x), self.y, reduction="none")
        for loss in losses:
            self.model.zero_grad()
            loss.backward(retain_graph=True)
            self._scorer.accumulate_grad(self.model)
        squares = {
            name: self._scorer._accu_grad[layer.weight] for name, layer in self.layers.items()
        }
        return self.filters(squares, 1 / len(self.x))

"""Torch-Pruning's OBDC importance without per-example weight gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.pruner import importance

from taylor_kernels.integrations.torch_pruning.parts import (
    is_into,
    is_one_of,
    places,
    weight_axis,
)
from taylor_kernels.integrations.torch_pruning.scoring import SweptGroups
from taylor_kernels.ops.conv2d_fisher import conv2d_fisher, linear_fisher
from taylor_kernels.parameter_fisher import ParameterFisher


class OBDCImportance(SweptGroups, importance.OBDCImportance):
    """`torch_pruning.pruner.importance.OBDCImportance`: Σ w²·Σ_n g_n² of each output channel.

    The calls are Torch-Pruning's: `_prepare_model(model, pruner)`, then for each batch a forward
    and a backward pass of the mean loss and `step()`, then `_rm_hooks(model)`; the pruner calls the
    rest. `step(closure)` takes the place of the passes too, and does without the gradients of
    weights, a third of their time. Σ_n g_n² comes from the inputs of layers and the gradients of
    their outputs by `tk.ParameterFisher`; there is no tensor of examples times parameters.

    Beyond Torch-Pruning 1.6.1:
        dilated, grouped, depthwise and transposed convolutions of any dimension, and layers with a
            bias; there these raise.
        `_prepare_model` takes every network; there it raises for all but attention.
        `_rm_hooks` takes its own hooks off and no one else's.
        when channels go, `adjust_fisher` cuts a layer's Fisher matrix where its weight is cut.
        frozen weights are left out.

    Args:
        group_reduction, normalizer, target_types: as Torch-Pruning's.
        bias: whether biases count; None: yes, but with strict_compat not unless asked for.
        num_classes: linear layers with as many outputs are passed over.
        strict_compat: Torch-Pruning's own numbers, with all that is said above undone.

    Attributes:
        Fisher: layer -> Σ_n g_n² over all steps, in the weight's shape (strict_compat: as there).
        steps: how many batches there were.
    """

    def __init__(
        self,
        group_reduction: str | None = "mean",
        normalizer: Any = "mean",
        bias: bool | None = None,
        target_types: Sequence[type[nn.Module]] = (nn.modules.conv._ConvNd, nn.Linear),
        num_classes: int | None = 100,
        *,
        strict_compat: bool = False,
    ) -> None:
        counted = not strict_compat if bias is None else bias
        super().__init__(group_reduction, normalizer, counted, list(target_types), num_classes)
        self.strict_compat = strict_compat
        self._of_bias: dict[nn.Module, Tensor] = {}
        self._parameters: dict[str, list[tuple[nn.Module, str]]] = {}
        self._meter: ParameterFisher | None = None

    def _prepare_model(self, model: nn.Module, pruner: Any) -> None:
        """Watch the layers whose output channels the pruner may take."""
        groups = pruner.DG.get_all_groups(
            ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
        )
        layers: dict[nn.Module, None] = {
            item.dep.target.module: None
            for group in groups
            for item in group
            if is_one_of(item.dep.target.module, self.target_types)
            and not is_into(item.dep.handler)
        }
        self.modules = list(layers)
        if self.strict_compat:  # its own _prepare_model stops at groups without attention
            for layer in layers:
                layer.register_forward_pre_hook(self._save_input)
                layer.register_backward_hook(self._save_grad_output)
            return
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._parameters = {}
        for layer in layers:
            for own in ("weight", *(["bias"] if self.bias else [])):
                held = getattr(layer, own)
                if isinstance(held, nn.Parameter) and held.requires_grad:
                    # Layers that share a weight have one matrix between them.
                    self._parameters.setdefault(names[held], []).append((layer, own))
        self._rm_hooks(model)
        self._meter = ParameterFisher(model, parameters=list(self._parameters))

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """Count the batch whose backward pass has just been.

        Args:
            closure: runs the model on a batch and returns its mean loss, in place of a backward
                pass before; computes no weight gradients, and leaves `.grad` alone.

        Raises:
            RuntimeError: there was no pass, or `_prepare_model` was not called; strict_compat with
                a closure, which Torch-Pruning does not know.
            ValueError: the closure returned no scalar that depends on the model.
        """
        if self.strict_compat:
            if closure is not None:
                raise RuntimeError(
                    "step: Torch-Pruning's takes no closure; with strict_compat call it after "
                    "backward()"
                )
            self._strict_step()
            return
        if self._meter is None:
            raise RuntimeError("step: call _prepare_model(model, pruner) first")
        self._meter.update(closure=closure)
        mean = self._meter.compute()
        for name, users in self._parameters.items():
            total = mean[name] * self._meter.examples
            for layer, own in users:
                (self.Fisher if own == "weight" else self._of_bias)[layer] = total
        self.steps += 1

    @torch.no_grad()
    def _strict_step(self) -> None:
        for layer in self.modules:
            x, dy = self.A[layer], self.DS[layer]
            self.A[layer] = self.DS[layer] = None
            if self.steps == 0:
                self.Fisher[layer] = 0
            self.Fisher[layer] += self._strict_squares(layer, x, dy)
        self.steps += 1

    def _strict_squares(self, layer: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
        """[out, in·k (+ 1 with a bias)]: Σ_n g_n² of each example's own loss, as there."""
        if isinstance(layer, nn.Linear) and x.dim() == 2:
            squares = linear_fisher(x, dy)
        elif isinstance(layer, nn.Conv2d) and _is_known_there(layer):
            padding: Any = layer.padding
            squares = conv2d_fisher(x, layer.weight.shape, dy, layer.stride, padding)
        else:
            return self.MatGradHandler(x, dy, layer).mul_(len(dy)).pow_(2).sum(0)
        squares = squares.flatten(1)
        if layer.bias is not None:
            of_bias = dy.flatten(2).sum(2) if dy.dim() > 2 else dy
            squares = torch.cat([squares, of_bias.square().sum(0)[:, None]], 1)
        return squares * len(dy) ** 2

    def _rm_hooks(self, model: nn.Module) -> None:
        """Take the hooks off that `_prepare_model` has put there."""
        if self.strict_compat:
            super()._rm_hooks(model)
        elif self._meter is not None:
            self._meter.close()

    def _clear_buffer(self) -> None:
        super()._clear_buffer()
        self._of_bias, self._meter = {}, None

    def adjust_fisher(self, group: Any, idxs: Sequence[int]) -> None:
        """Cut what is known of the layers of a group as their weights are about to be cut.

        Args:
            idxs: the channels of the group's root that go.
        """
        if self.strict_compat:
            super().adjust_fisher(group, idxs)
            return
        gone = set(idxs)
        for item in group:
            layer, into = item.dep.target.module, is_into(item.dep.handler)
            lost = {i for i, root in zip(item.idxs, item.root_idxs, strict=True) if root in gone}
            if layer not in self.Fisher or not lost:
                continue
            fisher, axis = self.Fisher[layer], weight_axis(layer, into)
            if fisher.size(axis) == _channel_rows(layer, fisher, into).size(0):
                kept = [i for i in range(fisher.size(axis)) if i not in lost]
                at = torch.tensor(kept, device=fisher.device)
                self.Fisher[layer] = fisher.index_select(axis, at)
            if layer in self._of_bias and not into:
                of_bias = self._of_bias[layer]
                kept = [i for i in range(len(of_bias)) if i not in lost]
                self._of_bias[layer] = of_bias[torch.tensor(kept, device=of_bias.device)]

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """[channels] float32: the score of each channel of the group's root.

        Raises:
            RuntimeError: there was no step(), or none since channels went.
        """
        if self.strict_compat:
            return super().__call__(group)
        if not self.steps:
            raise RuntimeError(
                "there was no step(): call it after the backward pass of each batch, between "
                "_prepare_model(model, pruner) and _rm_hooks(model)"
            )
        found = []
        for item in group:
            layer: Any = item.dep.target.module
            if is_into(item.dep.handler) or not is_one_of(layer, self.target_types):
                continue
            if isinstance(layer, nn.Linear) and layer.out_features == self.num_classes:
                continue
            for of, parameter in ((self.Fisher, layer.weight), (self._of_bias, layer.bias)):
                if layer in of:
                    score = self._of_channels(layer, of[layer], parameter.detach())
                    found.append((score[places(item.idxs)], item.root_idxs))
        if not found:
            return None
        return self._normalize(self._reduced(group, found), self.normalizer)

    def _of_channels(self, layer: nn.Module, fisher: Tensor, parameter: Tensor) -> Tensor:
        """[channels] on the host: Σ w²·F of a weight, or of a bias."""
        if fisher.shape != parameter.shape:
            raise RuntimeError(
                "a grouped convolution was cut since the last step(): call _prepare_model(model, "
                "pruner) and step() anew before the next step of pruning"
            )
        terms = (fisher / self.steps + self.eps) * parameter.square()
        rows = terms if terms.dim() == 1 else _channel_rows(layer, terms, False).flatten(1).sum(1)
        return rows.float().cpu()


def _channel_rows(layer: nn.Module, table: Tensor, into: bool) -> Tensor:
    """A weight-shaped table with a row for each channel of the layer's output, or of its input."""
    axis, groups = weight_axis(layer, into), getattr(layer, "groups", 1)
    if axis == 0:
        return table
    return table.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _is_known_there(layer: nn.Conv2d) -> bool:
    """Whether Torch-Pruning's unfolding gives the layer's gradient."""
    plain = layer.groups == 1 and tuple(layer.dilation) == (1, 1)
    return plain and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)

"""Torch-Pruning's Hessian importance, from per-example squares of one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_pruning.pruner import function, importance

from taylor_kernels.integrations.torch_pruning.parts import Part
from taylor_kernels.integrations.torch_pruning.scoring import SweptGroups
from taylor_kernels.integrations.torch_pruning.sweep import Sweep
from taylor_kernels.integrations.torch_pruning.taylor import TARGET_TYPES
from taylor_kernels.parameter_fisher import ParameterFisher


class GroupHessianImportance(SweptGroups, importance.GroupHessianImportance):
    """`torch_pruning.importance.GroupHessianImportance`: Σ w²·mean_n g_n² of what goes together.

    g_n is the gradient of example n's own loss, so that this is optimal brain damage with the
    diagonal of the empirical Fisher matrix (without its factor ½). Two ways to gather it:

        scorer.zero_grad()
        scorer.accumulate(model, lambda: loss_fn(model(x), y))     # all examples in one pass

    which takes about a plain step, computes no weight gradients and leaves `.grad` alone; or the
    documented loop over examples, unchanged, with accumulate_grad(). Both add up over batches until
    a group was scored; what is gathered after that starts anew, as in Torch-Pruning.

    Beyond Torch-Pruning 1.6.1:
        every example counts; there `accumulate_grad` keeps the last alone.
        `.grad` is not overwritten by scoring; there it holds the squares afterwards.
        what GroupTaylorImportance lists: depthwise and grouped convolutions, biases of norms (there
            an error), weights that are shared, permuted channels.

    BatchNorm in train mode mixes the examples of a batch. Put the model into eval mode, or see
    `tk.ParameterFisher` for what is squared otherwise.

    Args:
        group_reduction, normalizer, target_types: as Torch-Pruning's.
        bias: whether biases count; None: yes, but with strict_compat not unless asked for.
        strict_compat: Torch-Pruning's own numbers, with all that is said above undone.

    Example:
        >>> import torch
        >>> import torch_pruning as tp
        >>> from torch import nn
        >>> from taylor_kernels.integrations.torch_pruning import GroupHessianImportance
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> x, scorer = torch.randn(4, 3, 9, 9), GroupHessianImportance()
        >>> scorer.accumulate(model, lambda: model(x).square().mean())
        >>> graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
        >>> group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, list(range(8)))
        >>> scorer(group).shape
        torch.Size([8])
    """

    _accu_grad: dict[nn.Parameter, Tensor]
    _counter: dict[nn.Parameter, int]
    _strict_norms = (function.prune_batchnorm_out_channels, function.prune_layernorm_out_channels)

    def __init__(
        self,
        group_reduction: str | None = "mean",
        normalizer: Any = "mean",
        bias: bool | None = None,
        target_types: Sequence[type[nn.Module]] = TARGET_TYPES,
        *,
        strict_compat: bool = False,
    ) -> None:
        counted = not strict_compat if bias is None else bias
        super().__init__(group_reduction, normalizer, counted, list(target_types))
        self.strict_compat = strict_compat
        self._sweep = Sweep(self._mean_square, "gw", squared=True)
        self._examples = 0
        self._seen: set[nn.Parameter] = set()
        self._scored = False

    def zero_grad(self) -> None:
        """Forget what was gathered."""
        super().zero_grad()
        self._examples, self._scored = 0, False
        self._seen = set()

    @torch.no_grad()
    def accumulate_grad(self, model: nn.Module) -> None:
        """Count `.grad` as the gradient of one example's own loss."""
        if self.strict_compat:
            super().accumulate_grad(model)
            return
        self._begin(model)
        for parameter in model.parameters():
            if parameter.grad is not None:
                gradient = parameter.grad.detach()
                self._add(parameter, gradient.float() if _is_half(gradient) else gradient)
        self._examples += 1

    def accumulate(
        self,
        model: nn.Module,
        closure: Callable[[], Tensor],
        *,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        """Count every example of a batch, in one backward pass.

        Args:
            model: the model to be pruned.
            closure: runs it on a batch and returns the loss, a scalar; dim 0 of what the model is
                given counts examples.
            reduction: whether that is the mean or the sum of the examples' losses.

        Raises:
            RuntimeError: strict_compat, which has no such verb; or the model was not called.
            ValueError: the closure returned no scalar that depends on the model.
        """
        if self.strict_compat:
            raise RuntimeError(
                "accumulate: Torch-Pruning has no such method; with strict_compat call "
                "accumulate_grad() after the backward pass of each example"
            )
        meter = ParameterFisher(model, reduction=reduction)
        try:
            meter.update(closure=closure)
        finally:
            meter.close()
        self._begin(model)
        parameters = dict(model.named_parameters())
        for name, mean in meter.compute().items():
            self._add_squares(parameters[name], mean.mul_(meter.examples))
        self._examples += meter.examples

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """[channels] float32 on the host: the score of each channel of the group's root.

        Raises:
            RuntimeError: nothing was gathered, or parameters were replaced (by pruning) since.
        """
        if not self.strict_compat:
            if not self._examples:
                raise RuntimeError(
                    "nothing was gathered: call accumulate(model, closure) for each batch, or "
                    "accumulate_grad(model) after the backward pass of each example"
                )
            score = self._score(group)
            self._scored = True
            return score
        for parameter, square in self._accu_grad.items():
            assert parameter.grad is not None
            parameter.grad.data = square / self._counter[parameter]
        self._accu_grad, self._counter = {}, {}
        score = self._strict_score(group)
        return super().__call__(group) if score is NotImplemented else score

    def _begin(self, model: nn.Module) -> None:
        if self._scored:
            self.zero_grad()
        self._seen.update(model.parameters())

    def _add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        known = self._accu_grad.get(parameter)
        if known is None:
            self._accu_grad[parameter] = gradient.square()
        else:
            known.addcmul_(gradient, gradient)

    def _add_squares(self, parameter: nn.Parameter, squares: Tensor) -> None:
        known = self._accu_grad.get(parameter)
        self._accu_grad[parameter] = squares if known is None else known.add_(squares)

    def _mean_square(self, parameter: nn.Parameter) -> Tensor | None:
        """Σ_n g_n²; `_value` divides by the number of examples."""
        if self.strict_compat:
            return parameter.grad
        return self._accu_grad.get(parameter)

    def _value(self, table: Tensor) -> Tensor:
        return table if self.strict_compat else table / self._examples

    def _tables(self, group: Any, parts: Sequence[Part]) -> list[Tensor | None]:
        if not self.strict_compat and any(part.parameter not in self._seen for part in parts):
            raise RuntimeError(
                "parameters were replaced since their gradients were gathered, as pruning does; "
                "gather them anew before the next step of pruning"
            )
        return super()._tables(group, parts)

    def _strict_parts(self, layer: Any, handler: Any, item: Any) -> Any:
        """As Torch-Pruning: parameters without a gradient are passed over."""
        for part, repeat in super()._strict_parts(layer, handler, item):
            if part.parameter.grad is not None:
                # Its branch of BatchNorm's bias tests the gradient the wrong way round.
                if part.name == "bias" and handler == function.prune_batchnorm_out_channels:
                    continue
                yield part, repeat
            elif part.name == "bias" and handler == function.prune_batchnorm_out_channels:
                yield part, 0


class HessianImportance(GroupHessianImportance, importance.HessianImportance):
    """`torch_pruning.importance.HessianImportance`, another name of GroupHessianImportance."""


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)

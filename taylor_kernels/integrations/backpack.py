"""BackPACK: squared per-example gradients, and their norms, without these gradients.

    from backpack import backpack, extend
    from taylor_kernels.integrations.backpack import BatchL2Grad, SumGradSquared

    with backpack(SumGradSquared(), BatchL2Grad()):
        loss.backward()

BackPACK forms [N, parameters] of a layer, or unfolds its whole input, before it squares. Here
kernels sum the squares. The fields and their values are BackPACK's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.integrations import absent
from taylor_kernels.parameter_fisher.kinds import Kind, Use, kinds_of, squared_norms, summed_squares

try:
    from backpack import extensions
    from backpack.utils.errors import batch_norm_raise_error_if_train
except ModuleNotFoundError as error:
    raise absent(error, "backpack", "backpack-for-pytorch", "1.7.1") from error


class _OfKinds(extensions.backprop_extension.BackpropExtension):
    """Fills a field of a module's parameters from its input and the gradient of its output."""

    #: The backward pass that runs, and in it who filled a parameter's field: ids, since a module
    #: that is held here would outlive its model.
    _task: int | None = None
    _claimed: dict[int, tuple[int, str]]

    @torch.no_grad()
    def __call__(self, module: nn.Module, g_inp: Any, g_out: Any) -> None:
        kinds = {
            name: kind
            for name, kind in kinds_of(module).items()
            if getattr(module, name).requires_grad
        }
        if not kinds:
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                super().__call__(module, g_inp, g_out)  # knows RNNs, and warns of what it does not
            return
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            batch_norm_raise_error_if_train(module)
        if not hasattr(module, "input0"):
            raise RuntimeError(
                f"{type(module).__name__}: was called more than once, and BackPACK keeps the input "
                "of one call; use tk.ParameterFisher, which adds the gradients of all up"
            )
        x: Any = module.input0
        for name, kind in kinds.items():
            parameter = getattr(module, name)
            self._claim(parameter, module, name)
            setattr(parameter, self.savefield, self._value(kind, (x, g_out[0])))

    def _claim(self, parameter: nn.Parameter, module: nn.Module, name: str) -> None:
        """The field holds what one module makes of it: the squares of two do not add up."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task, self._claimed = task, {}
        own = (id(module), type(module).__name__)
        first = self._claimed.setdefault(id(parameter), own)
        if first != own:
            raise RuntimeError(
                f"{type(module).__name__}.{name}: is shared with another module ({first[1]}), and "
                "BackPACK keeps the share of one; use tk.ParameterFisher, which adds the gradients "
                "of all up"
            )

    def _value(self, kind: Kind, use: Use) -> Tensor:
        raise NotImplementedError


class SumGradSquared(_OfKinds, extensions.SumGradSquared):
    """BackPACK's `SumGradSquared`: `param.sum_grad_squared`, Σ_n g_n² in the parameter's shape.

    g_n is example n's share of the loss's gradient: of a mean over N examples it has the factor
    1/N, as with BackPACK. Beyond its layers: LayerNorm, GroupNorm, InstanceNorm and RMSNorm,
    convolutions with any padding, groups and dilation.
    """

    def _value(self, kind: Kind, use: Use) -> Tensor:
        return summed_squares([(kind, use)], None)


class BatchL2Grad(_OfKinds, extensions.BatchL2Grad):
    """BackPACK's `BatchL2Grad`: `param.batch_l2`, [N], Σ over a parameter's elements of g_n².

    g_n and the layers are those of `SumGradSquared`.
    """

    def _value(self, kind: Kind, use: Use) -> Tensor:
        return squared_norms(kind, use)

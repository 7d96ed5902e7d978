"""scoring(): gradients of activations without gradients of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from taylor_kernels.checks import check_module
from taylor_kernels.statistics.layers import is_layer


class _StartGraph(torch.autograd.Function):
    """The tensor itself, as a non-leaf that requires a gradient: in-place ops may follow."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, root: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


class _StartBeside(torch.autograd.Function):
    """A view of the tensor that requires a gradient; the tensor, which others may have kept, stays
    as it is, and its version too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, root: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


@contextmanager
def scoring(model: nn.Module) -> Iterator[nn.Module]:
    """Score with `taylor_fo_gate`, `taylor_fo_bn` or `obd_fisher` without weight gradients.

    Inside, no parameter requires a gradient, so backward() computes none: neither the products
    for them nor their memory. Gradients of activations flow from the loss back to the output of
    the first convolution or linear layer, or into the first nn.MultiheadAttention, which is all
    that they need. (The gates of experts are read off gradients of their weights: train to score
    those, or use `taylor_fo`.) On leaving, every parameter's `requires_grad` is as it was; `.grad`
    is never touched.

    An nn.TransformerEncoder does not pack padded examples inside, as it does in eval mode where
    nothing requires a gradient: its layers would run on nested tensors, which have none.

    The model's mode is yours to choose: eval() scores the network as it will be used, train()
    normalises by the batch and moves BatchNorm's running statistics as any forward pass does.

    Example:
        >>> import torch, taylor_kernels as tk
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> imp = tk.Importance(model, "taylor_fo_gate")
        >>> with tk.scoring(model):
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     imp.update()
        >>> {name: tuple(scores.shape) for name, scores in imp.compute().items()}
        {'0': (3,), '2': (2,)}
        >>> model[0].weight.grad is None
        True
    """
    check_module(model)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    root = torch.empty(0, requires_grad=True)

    def start(_: nn.Module, __: tuple, output: Any) -> Tensor | None:
        if torch.is_grad_enabled() and isinstance(output, Tensor) and not output.requires_grad:
            return _StartGraph.apply(output, root)
        return None

    def start_inside(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not torch.is_grad_enabled() or any(tensor.requires_grad for tensor in given):
            return None
        # The query, the key and the value, which may be one: that it is says what is computed.
        named = (kwargs[name] for name in ("query", "key", "value") if name in kwargs)
        streams = {id(one): one for one in (*args[:3], *named)}
        new = {key: _StartBeside.apply(one, root) for key, one in streams.items()}
        return (
            tuple(new.get(id(value), value) for value in args),
            {name: new.get(id(value), value) for name, value in kwargs.items()},
        )

    # Before other hooks: those of Importance must see an output that requires a gradient.
    handles = [
        module.register_forward_hook(start, prepend=True)
        for module in model.modules()
        if is_layer(module) or isinstance(module, _BatchNorm)
    ]
    handles += [
        module.register_forward_pre_hook(start_inside, with_kwargs=True, prepend=True)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    ]
    packing = [
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False)
    ]
    try:
        for encoder in packing:
            encoder.use_nested_tensor = False
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield model
    finally:
        for handle in handles:
            handle.remove()
        for encoder in packing:
            encoder.use_nested_tensor = True
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

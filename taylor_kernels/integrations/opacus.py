"""Opacus: fast gradient clipping ("ghost clipping") of convolutions.

    from taylor_kernels.integrations.opacus import register_norm_samplers

    register_norm_samplers()
    engine.make_private(..., grad_sample_mode="ghost")

Ghost clipping needs the norm of each example's gradient and not the gradient. Opacus 1.6.0 has
norms for linear layers and embeddings; of every other layer, convolutions included, it makes the
gradients of all examples, [N, parameters], to take their norms. Here those of
`conv2d_example_norms` and its like are registered for `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` and
`nn.Linear`.

Opacus's own linear norms return nothing where the input has two middle dimensions or more, and its
convolutions read zeros whatever the `padding_mode`; both are right here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_kernels.integrations import absent
from taylor_kernels.layout import accumulator
from taylor_kernels.ops.example_norms import (
    conv1d_example_norms,
    conv2d_example_norms,
    conv3d_example_norms,
    linear_example_norms,
)

try:
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleHooksFastGradientClipping,
    )
    from opacus.grad_sample.utils import register_norm_sampler
except ModuleNotFoundError as error:
    raise absent(error, "opacus", "opacus", "1.6.0") from error

Norms = dict[nn.Parameter, Tensor]
Sampler = Callable[[Any, list[Tensor], Tensor], Norms]

_CONVOLUTIONS = {
    nn.Conv1d: conv1d_example_norms,
    nn.Conv2d: conv2d_example_norms,
    nn.Conv3d: conv3d_example_norms,
}


class Registration:
    """What `register_norm_samplers` did: `remove()`, or the end of a `with` block, undoes it."""

    def __init__(self, samplers: dict[type[nn.Module], Sampler]) -> None:
        registry = GradSampleHooksFastGradientClipping.NORM_SAMPLERS
        self._samplers = samplers
        self._before = {kind: registry.get(kind) for kind in samplers}
        for kind, sampler in samplers.items():
            register_norm_sampler(kind)(sampler)

    def remove(self) -> None:
        """Register what was registered before; what others have registered since then stays."""
        registry = GradSampleHooksFastGradientClipping.NORM_SAMPLERS
        for kind, sampler in self._samplers.items():
            if registry.get(kind) is sampler:
                del registry[kind]
                if before := self._before[kind]:
                    registry[kind] = before
        self._samplers = {}

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def register_norm_samplers(*, backend: str | None = None) -> Registration:
    """Have Opacus take the norms of per-example gradients of convolutions and linear layers here.

    It holds for every `grad_sample_mode="ghost"` of this process, models that are wrapped already
    included. As with linear layers, Opacus then refuses a layer that is called twice in a forward
    pass (parameters that are tied), with an error that says so.

    Args:
        backend: of the norms, as of `conv2d_example_norms`.

    Returns:
        A `Registration`, whose `remove()` undoes it; also as a context manager.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from opacus.grad_sample import GradSampleModuleFastGradientClipping
        >>> from taylor_kernels.integrations.opacus import register_norm_samplers
        >>> with register_norm_samplers():
        ...     model = GradSampleModuleFastGradientClipping(nn.Conv2d(3, 8, 3))
        ...     model(torch.randn(4, 3, 9, 9)).square().mean().backward()
        ...     norms = model.get_norm_sample()  # [4]
    """

    def convolution(layer: Any, activations: list[Tensor], backprops: Tensor) -> Norms:
        return _convolution_norms(layer, activations[0].to(backprops.dtype), backprops, backend)

    def linear(layer: Any, activations: list[Tensor], backprops: Tensor) -> Norms:
        found: Norms = {}
        if layer.weight.requires_grad:
            x = activations[0].to(backprops.dtype)
            found[layer.weight] = linear_example_norms(x, backprops, backend=backend).sqrt()
        if layer.bias is not None and layer.bias.requires_grad:
            rows = backprops.unsqueeze(1) if backprops.dim() == 2 else backprops.flatten(1, -2)
            found[layer.bias] = _bias_norms(rows.mT)
        return found

    return Registration({nn.Linear: linear, **dict.fromkeys(_CONVOLUTIONS, convolution)})


def _convolution_norms(layer: Any, x: Tensor, backprops: Tensor, backend: str | None) -> Norms:
    found: Norms = {}
    if layer.weight.requires_grad:
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        elif padding == "valid":
            padding = 0
        elif padding == "same":  # one more behind than in front, where the sum is odd
            x = F.pad(x, layer._reversed_padding_repeated_twice)
            padding = 0
        norms = _CONVOLUTIONS[type(layer)](
            x, layer.weight.shape, backprops, layer.stride, padding, layer.dilation, layer.groups,
            backend=backend,
        )  # fmt: skip
        found[layer.weight] = norms.sqrt()
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = _bias_norms(backprops.flatten(2))
    return found


def _bias_norms(backprops: Tensor) -> Tensor:
    """Norms, [N], of the sums over the positions of [N, O, positions]."""
    sums = backprops.sum(2, dtype=accumulator(backprops.dtype))
    return torch.linalg.vector_norm(sums, dim=1)

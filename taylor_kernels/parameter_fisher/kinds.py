"""The kinds of parameters whose per-example gradients follow from a module's input and its dy.

    weight of a linear layer or a convolution   g_n = Σ_positions dy ⊗ x (see `conv2d_fisher`)
    bias                                        g_n = Σ_positions dy
    γ, β of a norm                              g_n = Σ_positions dy·x̂,  Σ_positions dy
    embedding                                   g_n[token] = Σ_{positions of the token} dy

Sums run over the positions of an example. Everything here is of one use of a module, and dim 0 of
its input counts examples.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from taylor_kernels.layout import accumulator
from taylor_kernels.ops.gate_gradients import gate_gradients
from taylor_kernels.statistics.layer_fisher import (
    weight_fisher,
    weight_gradients,
    weight_norms,
)
from taylor_kernels.statistics.layers import is_layer

#: The input of one use of a module, and the gradient of its output; dim 0 is the example.
Use = tuple[Tensor, Tensor]
#: Elements of per-example gradients that are held at once.
_CHUNK = 1 << 20


class Kind(ABC):
    """One parameter of one module, and how its gradients come about."""

    def __init__(self, module: nn.Module, shape: torch.Size) -> None:
        self.module = module
        self.shape = shape

    @abstractmethod
    def gradients(self, use: Use) -> Tensor:
        """[N, *shape], float32 at least: the gradient of each of a few examples."""

    def squares(self, uses: list[Use], backend: str | None) -> Tensor | None:
        """Σ_n (Σ over uses of this module of g_n)², or None where `summed_squares` is as good."""
        return None

    def norms(self, use: Use) -> Tensor | None:
        """[N], Σ over elements of g_n², or None where `squared_norms` is as good."""
        return None


def summed_squares(uses: list[tuple[Kind, Use]], backend: str | None) -> Tensor:
    """Σ_n (Σ over uses of g_n)² of a parameter, some examples at a time."""
    kind, (x, _) = uses[0]
    if all(k.module is kind.module for k, _ in uses):
        fused = kind.squares([use for _, use in uses], backend)
        if fused is not None:
            return fused
    step = max(1, _CHUNK // max(1, kind.shape.numel()))
    total: Tensor | None = None
    for start in range(0, len(x), step):
        some = slice(start, start + step)
        gradients = [k.gradients((x[some], dy[some])) for k, (x, dy) in uses]
        squares = sum(gradients[1:], gradients[0]).square().sum(0)
        total = squares if total is None else total + squares
    assert total is not None
    return total


def squared_norms(kind: Kind, use: Use) -> Tensor:
    """[N]: Σ over a parameter's elements of g_n², some examples at a time."""
    found = kind.norms(use)
    if found is not None:
        return found
    x, dy = use
    step = max(1, _CHUNK // max(1, kind.shape.numel()))
    chunks = zip(x.split(step), dy.split(step), strict=True)
    return torch.cat([kind.gradients(some).square().flatten(1).sum(1) for some in chunks])


class LayerWeight(Kind):
    """Of a linear layer or a convolution of any kind."""

    def gradients(self, use: Use) -> Tensor:
        return weight_gradients(self.module, use)  # type: ignore[arg-type]

    def squares(self, uses: list[Use], backend: str | None) -> Tensor:
        return weight_fisher(self.module, uses, backend)  # type: ignore[arg-type]

    def norms(self, use: Use) -> Tensor:
        return weight_norms(self.module, use)  # type: ignore[arg-type]


class Bias(Kind):
    """Of a layer or a norm: what is added along `dims` of its output, channels first or last."""

    def gradients(self, use: Use) -> Tensor:
        _require_batch(self.module, use[0], self.shape)
        dy = use[1]
        dims = _others(dy, self.module, len(self.shape))
        return dy.sum(dims, dtype=accumulator(dy.dtype)) if dims else dy.to(accumulator(dy.dtype))


class NormWeight(Kind):
    """γ of a norm."""

    def gradients(self, use: Use) -> Tensor:
        x, dy = use[0].to(use[1].dtype), use[1]
        module = self.module
        _require_batch(module, x, self.shape)
        if isinstance(module, _BatchNorm):
            # x̂ itself is not needed: Σ dy·x̂ = Σ dy·(x − mean) / sqrt(var + ε).
            mean, variance = _statistics(module, x)
            scale = (variance + module.eps).rsqrt()
            return gate_gradients(x, dy, bias=mean.to(x.dtype)) * scale
        normed, dy = _normed(module, x.to(accumulator(x.dtype))), dy.to(accumulator(x.dtype))
        if len(self.shape) == 1:
            last = _is_last(module)
            return gate_gradients(normed, dy, channel_dim=normed.dim() - 1 if last else 1)
        product = normed * dy
        dims = _others(dy, module, len(self.shape))
        return product.sum(dims) if dims else product


class EmbeddingWeight(Kind):
    """A row for each token; an example's gradient has as many rows as it has different tokens."""

    def gradients(self, use: Use) -> Tensor:
        rows, keys = self._rows(use)
        vocabulary, width = self.shape
        dense = rows.new_zeros(len(use[0]) * vocabulary, width)
        return dense.index_copy_(0, keys, rows).view(-1, vocabulary, width)

    def squares(self, uses: list[Use], backend: str | None) -> Tensor | None:
        if len(uses) > 1:
            tokens = torch.cat([x.flatten(1) if x.dim() > 1 else x[:, None] for x, _ in uses], 1)
            dy = torch.cat([dy.reshape(len(x), -1, self.shape[1]) for x, dy in uses], 1)
            if self.module.scale_grad_by_freq:
                return None  # each use has frequencies of its own
            uses = [(tokens, dy)]
        rows, keys = self._rows(uses[0])
        fisher = rows.new_zeros(self.shape)
        return fisher.index_add_(0, keys % self.shape[0], rows.square())

    def norms(self, use: Use) -> Tensor:
        rows, keys = self._rows(use)
        norms = rows.new_zeros(len(use[0]))
        return norms.index_add_(0, keys // self.shape[0], rows.square().sum(1))

    def _rows(self, use: Use) -> Use:
        """The rows of all examples that are not 0, and for each example·vocabulary + token."""
        tokens, dy = use
        vocabulary, width = self.shape
        examples = torch.arange(len(tokens), device=tokens.device)
        examples = examples.view(-1, *[1] * (tokens.dim() - 1))
        keys, dy = (tokens + examples * vocabulary).flatten(), dy.reshape(-1, width)
        padding: Any = self.module.padding_idx
        if padding is not None:
            kept = (tokens != padding).flatten()
            keys, dy = keys[kept], dy[kept]
        keys, at, counts = keys.unique(return_inverse=True, return_counts=True)
        rows = dy.new_zeros(len(keys), width, dtype=accumulator(dy.dtype))
        rows.index_add_(0, at, dy.to(rows.dtype))
        if self.module.scale_grad_by_freq:
            rows /= counts[:, None]
        return rows, keys


def kinds_of(module: nn.Module) -> dict[str, Kind]:
    """The kind of each of a module's own parameters; {} if they must be seen otherwise.

    Only what runs PyTorch's own forward() is known: a subclass with another may do anything with
    its parameters, and so may a parametrization.
    """
    of_weight = _kind_of_weight(module)
    own = dict(module.named_parameters(recurse=False))
    if of_weight is None or not set(own) <= {"weight", "bias"}:
        return {}
    makers: dict[str, Callable[[nn.Module, torch.Size], Kind]] = {"weight": of_weight, "bias": Bias}
    return {name: makers[name](module, p.shape) for name, p in own.items()}


def _kind_of_weight(module: nn.Module) -> type[Kind] | None:
    if is_layer(module) and (_runs_as(module, nn.Linear) or _is_plain_convolution(module)):
        return LayerWeight
    if is_layer(module) and not isinstance(module, (_ConvNd, nn.Linear)):
        return LayerWeight  # a class of its own that is known by name
    norms = (nn.LayerNorm, nn.GroupNorm, nn.SyncBatchNorm, *_RMS_NORM)
    if any(_runs_as(module, norm) for norm in norms):
        return NormWeight
    if isinstance(module, _NormBase) and any(
        _runs_as(module, c) for c in (_BatchNorm, _InstanceNorm)
    ):
        return NormWeight
    return EmbeddingWeight if _runs_as(module, nn.Embedding) else None


_RMS_NORM: tuple[type[nn.Module], ...] = (nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()


def _runs_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    same = inspect.getattr_static(type(module), "forward", None) is kind.__dict__.get("forward")
    return isinstance(module, kind) and same and "forward" not in vars(module)


def _is_plain_convolution(module: nn.Module) -> bool:
    if not isinstance(module, _ConvNd):
        return False
    base = next(c for c in type(module).__mro__ if c.__module__ == "torch.nn.modules.conv")
    own = ("forward", "_conv_forward")
    return not any(name in vars(module) for name in own) and all(
        inspect.getattr_static(type(module), name, None) is inspect.getattr_static(base, name, None)
        for name in own
    )


def _is_last(module: nn.Module) -> bool:
    """Whether the features of a module's output are its last dimensions, not dim 1."""
    return not isinstance(module, (_ConvNd, _NormBase, nn.GroupNorm))


def _require_batch(module: nn.Module, x: Tensor, shape: torch.Size) -> None:
    """PyTorch takes one example without a batch, whose dim 0 would pass for examples."""
    if isinstance(module, _ConvNd):
        least = len(module.kernel_size) + 2
    elif isinstance(module, _InstanceNorm):
        least = module._get_no_batch_dim() + 1
    else:
        least = len(shape) + 1 if _is_last(module) else 2
    if x.dim() < least:
        raise ValueError(
            f"{type(module).__name__}: its input has no batch dimension, found shape "
            f"{tuple(x.shape)}; give it {least} dimensions, of which dim 0 counts examples"
        )


def _others(dy: Tensor, module: nn.Module, features: int) -> tuple[int, ...]:
    """The dimensions of dy that are neither the example nor a parameter's."""
    if _is_last(module):
        return tuple(range(1, dy.dim() - features))
    return tuple(range(2, dy.dim()))


def _normed(module: nn.Module, x: Tensor) -> Tensor:
    """x̂, what γ is multiplied by."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    if isinstance(module, _NormBase):  # an InstanceNorm
        own = module.training or not module.track_running_stats
        mean, variance = (None, None) if own else (module.running_mean, module.running_var)
        return F.instance_norm(x, mean, variance, None, None, own, 0.0, module.eps)
    rms_norm: Callable[..., Tensor] = F.rms_norm
    return rms_norm(x, module.normalized_shape, None, module.eps)


def _statistics(module: _BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance that a BatchNorm normalised by: the batch's own, or its running ones."""
    dtype = accumulator(x.dtype)
    if not module.training and module.running_mean is not None:
        assert module.running_var is not None
        return module.running_mean.to(dtype), module.running_var.to(dtype)
    dims = (0, *range(2, x.dim()))
    variance, mean = torch.var_mean(x.to(dtype), dims, correction=0)
    return mean, variance

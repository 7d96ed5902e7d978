"""Layers without the columns that are zero: a smaller product over what is left of the input.

A convolution of weight [O, I, *k] is the product of [O, I·k] with the unfolded input; columns that
are zero need neither be unfolded nor multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_kernels.checks import check_module, check_names


class LoweredLinear(nn.Module):
    """y = x[..., kept] Wᵀ + b: a linear layer that reads some of its inputs.

    Args:
        layer: the layer, whose dtype and device it has.
        kept: [I] bool, the inputs that it reads.

    Attributes:
        share: of the columns that are left.
    """

    kept: Tensor

    def __init__(self, layer: nn.Linear, kept: Tensor) -> None:
        super().__init__()
        self.share = kept.float().mean().item()
        index = torch.nonzero(kept.to(layer.weight.device)).flatten()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("kept", index)
        self.weight = nn.Parameter(layer.weight.detach()[:, index], layer.weight.requires_grad)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.index_select(-1, self.kept), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.kept.numel()} of {self.in_features}, {self.out_features}"


class LoweredConv(nn.Module):
    """A convolution that unfolds the columns it reads alone: 1d or 2d, of one group.

    For each kernel position the channels kept there are taken from the shifted input; what they
    make is [N, K, positions], the product with [O, K] the output.

    Args:
        layer: a Conv1d or Conv2d with groups = 1, whose dtype and device it has.
        kept: [I, *k] bool, the columns that it reads.

    Attributes:
        share: of the columns that are left.
    """

    def __init__(self, layer: nn.Conv1d | nn.Conv2d, kept: Tensor) -> None:
        super().__init__()
        self.share = kept.float().mean().item()
        self.flat = isinstance(layer, nn.Conv1d)
        kept = kept.to(layer.weight.device)
        weight = layer.weight.detach()
        if self.flat:
            kept, weight = kept[:, None], weight[:, :, None]
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.columns = tuple(kept.shape[1:]), kept.numel()
        self.stride, self.dilation = _two(layer.stride, 1), _two(layer.dilation, 1)
        # From the last dimension on, as F.pad has it, which takes the modes of convolutions too.
        self.padding = list(layer._reversed_padding_repeated_twice)
        self.padding += [0, 0] if self.flat else []
        self.padding_mode = layer.padding_mode
        by_position = kept.permute(1, 2, 0)  # [kh, kw, I]
        self.positions: list[tuple[int, int, str]] = []
        for row in range(by_position.size(0)):
            for column in range(by_position.size(1)):
                channels = torch.nonzero(by_position[row, column]).flatten()
                if channels.numel():
                    name = f"kept_{row}_{column}"
                    self.positions.append((row, column, name))
                    self.register_buffer(name, channels)
        columns = weight.permute(0, 2, 3, 1)[:, by_position]
        self.weight = nn.Parameter(columns.contiguous(), layer.weight.requires_grad)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.flat:
            x = x.unsqueeze(-2)
        single = x.dim() == 3
        x = x.unsqueeze(0) if single else x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        # An input of one row has nothing to reflect along it.
        padding = self.padding[:2] if self.flat else self.padding
        if any(padding):
            x = _padded(x, padding, mode, self.flat)
        height, width = (
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(
                x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True
            )
        )
        parts = []
        for row, column, name in self.positions:
            top, left = row * self.dilation[0], column * self.dilation[1]
            seen = x[
                ...,
                top : top + (height - 1) * self.stride[0] + 1 : self.stride[0],
                left : left + (width - 1) * self.stride[1] + 1 : self.stride[1],
            ]
            parts.append(seen.index_select(1, getattr(self, name)))
        columns = torch.cat(parts, 1).flatten(2)  # [N, K, positions]
        y = self.weight @ columns
        if self.bias is not None:
            y = y + self.bias[:, None]
        y = y.unflatten(2, (height, width))
        y = y.squeeze(0) if single else y
        return y.squeeze(-2) if self.flat else y

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"columns={self.weight.size(1)} of {self.columns}"
        )


def lower_columns(model: nn.Module, layers: Sequence[str] | None = None) -> dict[str, float]:
    """Replace layers that have columns of zeros by lowered ones, in place.

    Their weights become new, smaller parameters: make optimizers anew if training goes on.

    Args:
        model: with layers whose weights have columns that are zero throughout, as those that
            `SPP` has pruned.
        layers: names; by default all linear layers and convolutions (1d, 2d, of one group) with
            columns of zeros.

    Returns:
        Layer -> the share of its columns that are left.

    Raises:
        ValueError: a named layer that is of another kind, or has no columns of zeros, or no others.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> _ = model[0].weight.data[:, 1].zero_()
        >>> tk.methods.lower_columns(model)
        {'0': 0.6666666865348816}
    """
    check_module(model)
    if layers is not None:
        layers = check_names("layers", layers)
    found: dict[str, float] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    if layers is not None and (unknown := sorted(set(layers) - modules.keys())):
        raise ValueError(f"layers: the model has no module {unknown[0]!r}")
    new: dict[int, LoweredLinear | LoweredConv] = {}
    for name, module in modules.items():
        if layers is not None and name not in layers:
            continue
        reason = _why_not(module) or _why_not_here(modules, name)
        if not reason and id(module) not in new:
            kept = (module.weight.detach() != 0).any(0)
            if kept.all() or not kept.any():
                reason = "all of its columns are zero" if not kept.any() else "none is zero"
            elif isinstance(module, nn.Linear):
                new[id(module)] = LoweredLinear(module, kept)
            else:
                new[id(module)] = LoweredConv(module, kept)
        if reason and layers is not None:
            raise ValueError(f"layers: {name!r} cannot be lowered: {reason}")
        if not reason:
            found[name] = new[id(module)].share
    for name in found:
        replacement = new[id(modules[name])].train(modules[name].training)
        model.set_submodule(name, replacement)
    return found


def _why_not(module: nn.Module) -> str:
    if type(module) not in (nn.Linear, nn.Conv1d, nn.Conv2d):
        return f"it is a {type(module).__name__}"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups > 1:
        return f"it has {module.groups} groups"
    if "weight" not in module._parameters:
        return "its weight is computed from others"
    return ""


def _why_not_here(modules: Mapping[str, nn.Module], name: str) -> str:
    if not name:
        return "it is the whole model; put it into an nn.Sequential"
    parent = modules[name.rpartition(".")[0]]
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "its nn.TransformerEncoderLayer reads the weights by itself in eval mode"
    return ""


def _padded(x: Tensor, padding: list[int], mode: str, flat: bool) -> Tensor:
    if mode == "constant" or not flat:
        return F.pad(x, padding, mode)
    return F.pad(x.squeeze(-2), padding, mode).unsqueeze(-2)  # other modes want one dimension here


def _two(values: tuple[int, ...], first: int) -> tuple[int, int]:
    return (first, values[0]) if len(values) == 1 else (values[0], values[1])

"""The options of MirrorDescent: its methods by name, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.checks import check_flag, check_module, is_number
from taylor_kernels.layout import FLOATS, accumulator

#: Method -> its projection and how the stored value moves (ops/mirror_step.py).
METHODS = {
    "md-tanh-s": ("tanh", "dual"),
    "md-softmax-s": ("softmax", "dual"),
    "md-tanh": ("tanh", "mirror"),
    "md-softmax": ("softmax", "mirror"),
    "gd-tanh": ("tanh", "jacobian"),
    "pmf": ("softmax", "jacobian"),
    "binaryconnect": ("sign", "dual"),
}
_CHOICES: dict[str, tuple[object, ...]] = {
    "method": tuple(METHODS),
    "levels": ("binary", "ternary"),
    "optimizer": ("adam", "sgd"),
    "quantize": ("matrices", "all", False),
    "start": ("weights", "spread"),
}
#: Option -> what it must be, in words and as a test of a float.
_NUMBERS = {
    "lr": ("0 or more", lambda x: x >= 0),
    "eps": ("0 or more", lambda x: x >= 0),
    "momentum": ("from 0 to below 1", lambda x: 0 <= x < 1),
    "weight_decay": ("0 or more", lambda x: x >= 0),
    "beta": ("greater than 0", lambda x: x > 0),
    "beta_scale": ("1 or more", lambda x: x >= 1),
    "beta_max": ("greater than 0 and at most 1e35", lambda x: 0 < x <= 1e35),
}


def is_quantized(group: Mapping[str, Any], param: Tensor) -> bool:
    """Whether a parameter of this group becomes ±1, as its `quantize` says."""
    wanted = group["quantize"]
    return bool(wanted) and param.numel() > 0 and (wanted == "all" or param.dim() > 1)


def check_group(group: Mapping[str, Any], number: int) -> None:
    """The options of a parameter group are what they can be, or an error that names one."""
    where = f" (parameter group {number})" if number else ""
    for name, choices in _CHOICES.items():
        word = group[name] if isinstance(group[name], str) else None
        if not any(group[name] is each or word == each for each in choices):
            every = ", ".join(map(repr, choices))
            raise ValueError(f"{name}: {group[name]!r} is not one of {every}{where}")
    for name, (words, fits) in _NUMBERS.items():
        value = group[name]
        one = isinstance(value, Tensor) and value.numel() == 1
        if isinstance(value, bool) or not (one or isinstance(value, (int, float))):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}{where}")
        if not math.isfinite(value) or not fits(float(value)):
            raise ValueError(f"{name}: {float(value):g} is not {words}{where}")
    if group["beta"] > group["beta_max"]:
        raise ValueError(f"beta: {group['beta']:g} is above beta_max, {group['beta_max']:g}{where}")
    betas = group["betas"]
    pair = isinstance(betas, Sequence) and len(betas) == 2 and all(map(is_number, betas))
    if not pair or not all(0 <= each < 1 for each in betas):
        raise ValueError(f"betas: {betas!r} are not two numbers from 0 to below 1{where}")
    interval = group["beta_interval"]
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ValueError(f"beta_interval: {interval!r} is not a positive integer{where}")
    _check_scale(group["scale"], where)
    if group["levels"] == "ternary" and METHODS[group["method"]] == ("tanh", "mirror"):
        raise ValueError(
            "levels: 'md-tanh' is binary, since the ternary projection has no inverse in closed "
            f"form; take 'md-tanh-s' or 'md-softmax'{where}"
        )


def _check_scale(scale: object, where: str) -> None:
    if scale is None or (isinstance(scale, str) and scale == "layer"):
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ValueError(f"scale: {scale!r} is not None, 'layer' or a number{where}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: {scale:g} is not a number greater than 0{where}")


def scale_of(wanted: str | float | None, param: Tensor) -> float:
    """α, rounded as the parameter is, so that every weight is a level times it exactly."""
    if wanted is None:
        return 1.0
    if wanted == "layer":
        mean = param.detach().abs().mean(dtype=accumulator(param.dtype))
        return float(mean.to(param.dtype))
    return float(torch.tensor(wanted, dtype=param.dtype))


def check_start(group: Mapping[str, Any], number: int) -> None:
    """There is something to quantize, and its values can be the first x̃."""
    params = group["params"]
    for i, param in enumerate(params):
        name = f"params: number {i} of group {number}"
        if param.dtype not in FLOATS:
            raise TypeError(f"{name} is {param.dtype}; expected a floating dtype")
        if not is_quantized(group, param):
            continue
        if not bool(param.detach().isfinite().all()):
            raise ValueError(
                f"{name}, of shape {tuple(param.shape)}, has values that are not finite"
            )
        if group["scale"] == "layer" and not bool(param.detach().any()):
            raise ValueError(
                f"scale: {name[8:]} has zeros only, so 'layer' has nothing to measure; initialize "
                "it, or give a number"
            )
        scale = scale_of(group["scale"], param)
        if not 0 < scale < math.inf:
            raise ValueError(
                f"scale: {group['scale']!r} is {scale:g} in {param.dtype}, which {name[8:]} has; "
                "give a number that this dtype can hold, or keep the parameter in float32"
            )
    if group["quantize"] == "matrices" and not any(is_quantized(group, p) for p in params):
        raise ValueError(
            f"params: group {number} has no matrix among its {len(params)} tensors, so nothing of "
            "it is quantized; pass quantize=False for it, or quantize='all'"
        )


def check_gradients(groups: Sequence[Mapping[str, Any]], *, finite: bool) -> None:
    """The gradients are dense and, if asked, finite; or an error that names those which are not."""
    named = [
        (_name(group, i, number), param.grad)
        for number, group in enumerate(groups)
        for i, param in enumerate(group["params"])
        if param.grad is not None
    ]
    for name, grad in named:
        if grad.layout is not torch.strided:
            raise ValueError(
                f"gradients: that of {name} has layout {grad.layout}; a dense one is needed"
            )
    named = [(name, grad) for name, grad in named if grad.numel()]
    if not finite or not named:
        return
    # A finite norm says that all is; on a CPU it takes a twentieth of the time of isfinite().
    norms = torch._foreach_norm([grad for _, grad in named], 2)
    good = torch.stack([each.to("cpu", torch.float64) for each in norms]).isfinite().tolist()
    bad = [
        name
        for (name, grad), fine in zip(named, good, strict=True)
        if not fine and not bool(grad.isfinite().all())  # squares overflow before gradients do
    ]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(
            f"gradients: not finite for {', '.join(bad[:3])}{more}; nothing was changed. Look at "
            "the loss and the learning rate, or let a GradScaler skip such steps"
        )


def _name(group: Mapping[str, Any], place: int, number: int) -> str:
    if "param_names" in group:
        return repr(group["param_names"][place])
    shape = tuple(group["params"][place].shape)
    return f"parameter {place} of group {number} (shape {shape})"


def parameter_groups(
    model: nn.Module, *, first: bool = True, last: bool = True, **options: Any
) -> list[dict[str, Any]]:
    """Groups for `MirrorDescent` that leave the first or the last layer of a model in float.

    Layers are the modules that hold a tensor of two or more dimensions themselves, in the order of
    `model.modules()`.

    Args:
        first, last: False leaves that layer in float. Published results quantize both.
        options: of MirrorDescent, for what is quantized.

    Raises:
        ValueError: no layer is left to quantize.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> groups = tk.methods.parameter_groups(net, last=False)
        >>> [(group["quantize"], len(group["params"])) for group in groups]
        [('matrices', 4), (False, 2)]
        >>> optimizer = tk.methods.MirrorDescent(groups)
    """
    check_module(model)
    check_flag("first", first)
    check_flag("last", last)
    layers = [
        module
        for module in model.modules()
        if any(param.dim() > 1 for param in module.parameters(recurse=False))
    ]
    skipped = ([] if first else layers[:1]) + ([] if last else layers[-1:])
    if len({id(layer) for layer in skipped}) >= len(layers):
        raise ValueError(
            f"model: it has {len(layers)} layers with matrices, and none is left to quantize"
        )
    outside = {id(param) for layer in skipped for param in layer.parameters(recurse=False)}
    named = list(_named(model))
    wanted = options.pop("quantize", "matrices")
    inside = [pair for pair in named if id(pair[1]) not in outside]
    left = [pair for pair in named if id(pair[1]) in outside]
    groups = [{"params": inside, "quantize": wanted, **options}]
    if left:
        groups.append({"params": left, "quantize": False, **options})
    if torch.__version__ < "2.6":  # knows no named parameters
        for group in groups:
            group["params"] = [param for _, param in group["params"]]
    return groups


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, param) for name, param in model.named_parameters() if param.requires_grad)

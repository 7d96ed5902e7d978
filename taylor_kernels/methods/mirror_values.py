"""What MirrorDescent stores for a parameter, and the calls of its step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taylor_kernels.layout import accumulator
from taylor_kernels.methods.mirror_settings import METHODS
from taylor_kernels.ops.mirror_step import MirrorRule, flat_view, mirror_step

#: The names of a parameter's moments in the optimizer's state, as those of PyTorch's optimizers.
MOMENTS = {"sgd": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}


class Quantized(NamedTuple):
    """What `MirrorDescent.quantize` reports."""

    soft: Any  # what `evaluate` gave for the projected weights, None without one
    hard: Any  # and for the rounded ones
    distance: float  # mean |w/α − level| of the projected weights
    weights: int  # how many were rounded
    zeros: int  # of them, how many to 0

    def __str__(self) -> str:
        accuracy = "" if self.hard is None else f"soft {self.soft}, hard {self.hard}; "
        zeros = f", {self.zeros / max(self.weights, 1):.0%} of them 0" if self.zeros else ""
        return (
            f"{accuracy}{self.weights} weights rounded{zeros}, {self.distance:.1e} away on average"
        )


class Call:
    """The lists of one `mirror_step`."""

    def __init__(self) -> None:
        self._lists: tuple[list[Any], ...] = ([], [], [], [], [], [])

    def step(self, group: Mapping[str, Any], param: Tensor, state: Any, next_beta: float) -> None:
        """Move what is stored along the gradient."""
        rule = rule_of(group, state, next_beta, state["step"] + 1)
        kept: list[Tensor | None] = [None, None]
        for i, name in enumerate(MOMENTS[group["optimizer"]][: rule.moments]):
            if name not in state:
                state[name] = _stored(param, rule.moment_planes).zero_()
            kept[i] = _flat(state, name, param, rule.moment_planes)
        value = _flat(state, "value", param, rule.planes) if rule.planes else None
        self._add(param, param.grad, value, *kept, rule)

    def project(
        self, group: Mapping[str, Any], param: Tensor, state: Any, beta: float, rounded: bool
    ) -> None:
        """Write the weights of what is stored."""
        rule = rule_of(group, state, beta)._replace(rounded=rounded)
        self._add(param, None, _flat(state, "value", param, rule.planes), None, None, rule)

    def _add(self, *members: Any) -> None:
        for each, member in zip(self._lists, members, strict=True):
            each.append(member)

    def run(self, backend: str | None) -> None:
        if self._lists[0]:
            mirror_step(*self._lists, backend=backend)


def _strides(param: Tensor) -> tuple[int, ...]:
    """Of what is stored for a weight: the parameter's, or without its gaps."""
    if flat_view(param) is not None:
        return param.stride()
    return torch.empty(param.shape, device="meta").stride()


def _stored(param: Tensor, planes: int) -> Tensor:
    """Memory for numbers of each weight: of its shape, or [planes, *shape]."""
    shape, strides = tuple(param.shape), _strides(param)
    if planes > 1:
        shape, strides = (planes, *shape), (param.numel(), *strides)
    dtype = accumulator(param.dtype)
    return torch.empty_strided(shape, strides, dtype=dtype, device=param.device)


def _flat(state: Any, name: str, param: Tensor, planes: int) -> Tensor:
    """What is stored as [planes, elements], in the order in which the parameter lies in memory."""
    kept: Tensor = state[name]
    if kept.stride()[kept.dim() - param.dim() :] != _strides(param):
        kept = state[name] = _stored(param, planes).copy_(kept)  # the parameter was laid out anew
    return kept.as_strided((planes, param.numel()), (param.numel(), 1))


def rule_of(
    group: Mapping[str, Any], state: Mapping[str, Any], next_beta: float, step: int = 0
) -> MirrorRule:
    """How a parameter is updated in its `step`-th step, the first being 1."""
    adam = group["optimizer"] == "adam"
    decay, decay2 = group["betas"] if adam else (group["momentum"], 0.0)
    rate = float(group["lr"])
    if adam and step:
        rate *= (1 - decay2**step) ** 0.5 / (1 - decay**step)
    quantized = "value" in state
    projection, update = METHODS[group["method"]] if quantized else ("identity", "dual")
    return MirrorRule(
        projection,
        levels=2 if group["levels"] == "binary" else 3,
        update=update,
        direction="adam" if adam else "momentum" if decay else "gradient",
        rate=rate,
        decay=decay,
        decay2=decay2,
        eps=group["eps"],
        beta=group["beta"],
        next_beta=next_beta,
        scale=state["scale"] if quantized else 1.0,
        weight_decay=0.0 if quantized else group["weight_decay"],
    )


def first_value(group: Mapping[str, Any], param: Tensor) -> Tensor:
    """What is stored for the weights that a parameter starts with.

    x̃ is the weight w, or w / max |w| where it is to be spread, and for a softmax λ times that, a
    plane for each λ. The mirror forms store what that projects to with β = 1. A hard ternary step
    would round all of a usual start to 0, so it is always spread.
    """
    x = param.detach().to(accumulator(param.dtype))
    projection, update = METHODS[group["method"]]
    ternary = group["levels"] == "ternary"
    planes = 1
    if group["start"] == "spread" or (projection == "sign" and ternary):
        x = x / x.abs().max().clamp(min=torch.finfo(x.dtype).tiny)
    if projection == "softmax":
        x = torch.stack((-x, 0 * x, x)) if ternary else torch.stack((-x, x))
        planes = len(x)
        x = x.softmax(0) if update == "mirror" else x
    elif update == "mirror":
        x = x.tanh()
    return _stored(param, planes).copy_(x)

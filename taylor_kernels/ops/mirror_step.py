"""mirror_step: one step of mirror descent for quantization, for a list of parameters in place.

Of each parameter it keeps a stored value and writes w = α·P_β(value): in one pass over the
parameters and gradients it turns the gradient into a direction (itself, its momentum or Adam's),
moves the stored value along it, projects it and writes the weight. `MirrorRule` says how, one rule
for each parameter; csrc/common/mirror_step.h has the formulas.

It is the step of `tk.methods.MirrorDescent`, which holds the stored values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from taylor_kernels.backends import check_name, kernel
from taylor_kernels.layout import DIRECTIONS, PROJECTIONS, UPDATES, MirrorItem, accumulator
from taylor_kernels.ops._checks import check_like, check_tensor
from taylor_kernels.ops._in_place import define_in_place


class MirrorRule(NamedTuple):
    """How one parameter is updated and projected."""

    projection: str = "identity"  # of PROJECTIONS
    levels: int = 2  # 2: -1 and 1; 3: -1, 0 and 1
    update: str = "dual"  # of UPDATES
    direction: str = "gradient"  # of DIRECTIONS
    rounded: bool = False  # write the nearest level instead of the projection
    rate: float = 0.0  # the learning rate, with Adam's bias corrections
    decay: float = 0.0  # of the momentum, or of Adam's first moment
    decay2: float = 0.0  # of Adam's second moment
    eps: float = 0.0
    beta: float = 1.0  # of this step
    next_beta: float = 1.0  # by which the result is projected
    scale: float = 1.0  # α; 1 for "identity"
    weight_decay: float = 0.0  # of a parameter with projection "identity"

    @property
    def planes(self) -> int:
        """How many numbers are stored for each weight."""
        return {"identity": 0, "softmax": self.levels}.get(self.projection, 1)

    @property
    def moment_planes(self) -> int:
        """How many numbers are stored for each weight and moment."""
        return self.planes if self.update == "jacobian" and self.projection == "softmax" else 1

    @property
    def moments(self) -> int:
        """How many moments of the gradient are stored."""
        return DIRECTIONS.index(self.direction)


_CODES, _NUMBERS = 5, 8


def mirror_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    values: Sequence[Tensor | None],
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    rules: Sequence[MirrorRule],
    *,
    backend: str | None = None,
) -> None:
    """Update stored values by gradients and write the parameters, in place; one launch a device.

    Args:
        params: float32, float16, bfloat16 or float64, of any shape and strides; only written where
            the rule projects.
        grads: like the parameters; None leaves the stored value and projects it.
        values: [planes, elements] for each, in float32 (float64 for float64), elements in the
            order in which the parameter lies in memory; `MirrorRule.planes` says how many, None
            where they are none.
        first: the momentum or Adam's first moment, [moment planes, elements]; None if not wanted.
        second: Adam's second moment.
        rules: one for each parameter.
        backend: one of `taylor_kernels.available_backends()`; None picks by device.

    Raises:
        TypeError, ValueError: tensors that do not fit together or to their rule.
        RuntimeError: the named backend cannot run here.

    Example:
        >>> import torch
        >>> from taylor_kernels.ops.mirror_step import MirrorRule, mirror_step
        >>> w, dual = torch.zeros(3), torch.zeros(1, 3)
        >>> rule = MirrorRule("tanh", rate=0.5, next_beta=2.0)
        >>> mirror_step([w], [torch.tensor([1.0, 0.0, -1.0])], [dual], [None], [None], [rule])
        >>> dual.tolist(), w.equal((2 * dual[0]).tanh())
        ([[-0.5, 0.0, 0.5]], True)
    """
    check_name(backend)
    parts: dict[tuple[torch.device, bool], list[int]] = {}
    for i, param in enumerate(params):
        check_tensor(param, f"params[{i}]")
        parts.setdefault((param.device, param.dtype == torch.float64), []).append(i)
    for part in parts.values():
        codes: list[int] = []
        numbers: list[float] = []
        for rule in (rules[i] for i in part):
            codes += (
                PROJECTIONS.index(rule.projection),
                rule.levels,
                UPDATES.index(rule.update),
                DIRECTIONS.index(rule.direction),
                rule.rounded,
            )
            numbers += rule[5:]
        _op(
            [params[i].detach() for i in part],
            *(
                [params[i].new_empty(0) if each[i] is None else each[i] for i in part]
                for each in (grads, values, first, second)
            ),
            codes,
            numbers,
            backend,
        )


def _run(
    params: list[Tensor],
    grads: list[Tensor],
    values: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    codes: list[int],
    numbers: list[float],
    backend: str | None,
) -> list[Tensor]:
    """The op itself; tensors that are not wanted are empty. Gives those that are written."""
    rules = _rules(len(params), codes, numbers)
    for i, each in enumerate(zip(params, grads, values, first, second, rules, strict=True)):
        _check(i, *each)
    run = kernel("mirror_step", params[0].device, params[0].dtype, backend)
    items, copies = [], []
    for param, grad, value, m, v, rule in zip(
        params, grads, values, first, second, rules, strict=True
    ):
        if not param.numel():
            continue
        flat = flat_view(param)
        if flat is None:  # gaps or overlaps: the kernels work on a copy
            flat = param.contiguous().view(-1)
            copies.append((param, flat))
        items.append(
            MirrorItem(
                flat,
                _in_order_of(param, grad) if grad.numel() else None,
                value if value.numel() else None,
                m if m.numel() else None,
                v if v.numel() else None,
                param.numel(),
                param.dtype,
                PROJECTIONS.index(rule.projection),
                rule.levels,
                UPDATES.index(rule.update),
                DIRECTIONS.index(rule.direction),
                *rule[4:],
            )
        )
    if items:
        run(items)
    for param, flat in copies:
        param.copy_(flat.view(param.shape))
    return [t for each in (params, values, first, second) for t in each if t.numel()]


def flat_view(tensor: Tensor) -> Tensor | None:
    """All elements in the order in which they lie in memory, or None if that has gaps."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    turned = tensor.permute(order)
    return turned.view(-1) if turned.is_contiguous() else None


def _in_order_of(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient's elements in the order of the parameter's."""
    if grad.stride() != param.stride():
        like = torch.empty_like(param) if flat_view(param) is not None else param.contiguous()
        grad = like.copy_(grad)
    flat = flat_view(grad)
    return grad.contiguous().view(-1) if flat is None else flat


def _rules(count: int, codes: list[int], numbers: list[float]) -> list[MirrorRule]:
    if len(codes) != _CODES * count or len(numbers) != _NUMBERS * count:
        raise ValueError(
            f"rules: {len(codes)} codes and {len(numbers)} numbers for {count} parameters; pass "
            f"{_CODES} and {_NUMBERS} for each"
        )
    rules = []
    for i in range(count):
        projection, levels, update, direction, rounded = codes[_CODES * i : _CODES * (i + 1)]
        try:
            rule = MirrorRule(
                PROJECTIONS[projection],
                levels,
                UPDATES[update],
                DIRECTIONS[direction],
                bool(rounded),
                *numbers[_NUMBERS * i : _NUMBERS * (i + 1)],
            )
        except IndexError:
            raise ValueError(f"rules[{i}]: codes {codes[_CODES * i :][:_CODES]}") from None
        if levels not in (2, 3) or not _exists(rule):
            raise ValueError(f"rules[{i}]: there is no {rule}")
        rules.append(rule)
    return rules


def _exists(rule: MirrorRule) -> bool:
    """A ternary tanh has no inverse in closed form; hard steps have no slope; what is not projected
    is not scaled."""
    if rule.update == "dual":
        return rule.projection != "identity" or rule.scale == 1
    if rule.update == "jacobian":
        return rule.projection in ("tanh", "softmax")
    return rule.projection == "softmax" or (rule.projection == "tanh" and rule.levels == 2)


def _check(
    i: int,
    param: Tensor,
    grad: Tensor,
    value: Tensor,
    first: Tensor,
    second: Tensor,
    rule: MirrorRule,
) -> None:
    check_tensor(param, f"params[{i}]")
    if grad.numel():
        check_like(grad, f"grads[{i}]", param, f"params[{i}]")
    elif not rule.planes and param.numel():
        raise ValueError(f"grads[{i}]: none for a parameter that has no stored value")
    moments = rule.moments if grad.numel() else 0
    wanted = (
        ("values", value, rule.planes),
        ("first", first, rule.moment_planes if moments > 0 else 0),
        ("second", second, rule.moment_planes if moments > 1 else 0),
    )
    dtype = accumulator(param.dtype)
    for name, tensor, planes in wanted:
        if not planes:
            if tensor.numel() and name == "values":
                raise ValueError(f"values[{i}]: a parameter with no projection has none")
            continue
        check_tensor(tensor, f"{name}[{i}]")
        shape = (planes, param.numel())
        found = tuple(tensor.shape), tensor.dtype, tensor.device
        if found != (shape, dtype, param.device) or not tensor.is_contiguous():
            raise ValueError(
                f"{name}[{i}]: expected a contiguous {shape} of {dtype} on {param.device}, got "
                f"{found[0]} of {found[1]} on {found[2]}"
            )


_op = define_in_place(
    "mirror_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] values, Tensor(c!)[] first, "
    "Tensor(d!)[] second, int[] codes, float[] numbers, str? backend)",
    _run,
)
